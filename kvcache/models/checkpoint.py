"""A checkpoint folder as a source of models: read by transformers, and where needed converted once into the cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcache.models.cautions import of_gguf, of_safetensors
from kvcache.models.folder import fingerprint, holds_tokenizer, read_config, sha256_of, weight_files
from kvcache.models.skeleton import count_parameters, quiet, refusing, skeleton
from kvcache.models.weight_cache import ModelError, made_once

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

COPY_LIMIT_BYTES = 4 * 2**30
"""Weights above this are not copied into the cache: gpt2-large in float32 (3.1 GB) is, a 7-billion model is not."""

_LOCAL: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
_FLOATS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""safetensors' names of types, and torch's."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A folder with weights that are read here. Its methods, but `of`, are those of every source of models."""

    folder: Path
    weights: tuple[Path, ...] = ()
    """The safetensors files, or the one GGUF file; none where only a description is wanted."""
    key: str = ""
    """Names the content; what is converted from it lies under this name in the cache."""
    sha256: str | None = None
    """Of the original weights, where it is known without reading them."""

    @classmethod
    def of(cls, folder: Path, key: str | None = None, sha256: str | None = None) -> Checkpoint:
        """Find the checkpoint in `folder`.

        Raises:
            ModelError: the folder is missing or holds nothing that is read here.
        """
        weights = weight_files(folder)
        return cls(folder=folder, weights=weights, key=key or fingerprint(folder, weights), sha256=sha256)

    @property
    def gguf(self) -> str | None:
        """The name of the GGUF file; None where the weights are safetensors."""
        return next((path.name for path in self.weights if path.suffix == ".gguf"), None)

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is a tokenizer beside the weights, or in the GGUF file."""
        return self.gguf is not None or holds_tokenizer(self.folder)

    def skeleton(self, attn_implementation: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Make the model with its configuration and shapes, as `skeleton` does; it need not have weights."""
        return skeleton(read_config(self.folder, self.gguf), attn_implementation, dtype)

    def model(self, dtype: torch.dtype, device: str, attn_implementation: str) -> PreTrainedModel:
        """Load the model with its weights in `dtype`, into main memory, whatever `device` it is meant for.

        For the CPU the weights are mapped from a file that has them in `dtype`, which is made once if it must be
        (but see `COPY_LIMIT_BYTES`): so the processes that measure one model hold its weights once. A GPU has its
        own copy in any case.
        """
        source = self._as_safetensors()
        bare = source.skeleton(attn_implementation)
        if device == "cpu" and source._wants_copy(bare, dtype):  # noqa: SLF001  # another Checkpoint
            source = source._in_dtype(dtype)  # noqa: SLF001
        return source._read(dtype, attn_implementation)  # noqa: SLF001

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer that belongs to the weights."""
        if not self.has_tokenizer:
            raise ModelError(f"the folder {self.folder} holds no tokenizer; valid: a folder with tokenizer.json")
        return _read_tokenizer(self._as_safetensors().folder)

    def digest(self) -> str:
        """Name the weights by their SHA-256 (of several files: of the lines which `sha256sum` prints for them)."""
        with refusing(f"the weights in {self.folder}"):
            return self.sha256 or sha256_of(self.weights)

    def cautions(self, bare: PreTrainedModel) -> list[str]:
        """Return what a user should know of the weights of `bare`, in sentences."""
        with refusing(f"the weights in {self.folder}"):
            return list(of_safetensors(self.weights, bare) if self.gguf is None else of_gguf(self.weights[0]))

    def kept_as(self, bare: PreTrainedModel) -> str | None:
        """Return how the names of its folders in the cache begin; None: none is needed for every data type."""
        return None if self.gguf is None else f"{self.key}-"

    def _as_safetensors(self) -> Checkpoint:
        """Return itself, or the float32 copy of what its GGUF file holds."""
        if self.gguf is None:
            return self
        return self._copy(
            "float32", self._unpack, f"converting {self.gguf} once (about 15 s per 100 MB) into the cache"
        )

    def _unpack(self, target: Path) -> None:
        import torch

        model = self._read(torch.float32, "eager")
        # transformers takes every GGUF model for a quantised one (since when varies), which it refuses to write.
        for owner, name in ((model, "hf_quantizer"), (model.config, "quantization_config")):
            if hasattr(owner, name):
                delattr(owner, name)
        with quiet():
            model.save_pretrained(target)
            _read_tokenizer(self.folder, self.gguf).save_pretrained(target)

    def _wants_copy(self, bare: PreTrainedModel, dtype: torch.dtype) -> bool:
        """Return whether every process would convert the weights in its own memory, and a copy may be kept."""
        quantised = getattr(bare.config, "quantization_config", None) is not None
        if quantised or count_parameters(bare) * dtype.itemsize > COPY_LIMIT_BYTES:
            return False
        return not self._stored_types() <= {str(dtype).removeprefix("torch.")}

    def _stored_types(self) -> set[str]:
        """Read the floating-point types of the safetensors files from their headers."""
        from safetensors import safe_open

        stored = set()
        with refusing(f"the weights in {self.folder}"):
            for path in self.weights:
                with safe_open(path, framework="pt") as file:
                    stored |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  # no mapping
        return {_FLOATS.get(name, name) for name in stored if name.startswith(("F", "BF"))}

    def _in_dtype(self, dtype: torch.dtype) -> Checkpoint:
        name = str(dtype).removeprefix("torch.")

        def convert(target: Path) -> None:
            with quiet():
                self._read(dtype, "eager").save_pretrained(target)

        return self._copy(name, convert, f"converting {self.folder} to {name} once into the cache")

    def _copy(self, dtype: str, make: Callable[[Path], None], note: str) -> Checkpoint:
        folder = made_once(f"{self.key}-{dtype}", make, note=note)
        return replace(self, folder=folder, weights=weight_files(folder))

    def _read(self, dtype: torch.dtype, attn_implementation: str) -> PreTrainedModel:
        """Read it as transformers does: a safetensors file is mapped privately, so pages are shared until written."""
        from transformers import AutoModelForCausalLM

        config = read_config(self.folder, self.gguf)  # or a GGUF header would be parsed twice, 4 s each
        quantised = getattr(config, "quantization_config", None) is not None  # transformers deletes it when it unpacks
        with quiet(), refusing(f"the weights in {self.folder}"):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                self.folder,
                config=config,
                gguf_file=self.gguf,
                dtype=dtype,
                attn_implementation=attn_implementation,
                use_safetensors=True,
                output_loading_info=True,
                **_LOCAL,
            )
        model: PreTrainedModel = loaded[0]
        missing = sorted(loaded[1]["missing_keys"])
        if missing:  # transformers would measure random numbers in their place
            raise ModelError(
                f"the weights in {self.folder} lack {len(missing)} tensors of the model that config.json describes, "
                f"{missing[0]} among them"
            )
        if quantised:
            _finish_unpacking(model, dtype)
        return model


def _finish_unpacking(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Bring what a quantised checkpoint holds unquantised (its head, say) to `dtype`, in place.

    Without a GPU transformers unpacks 8-bit floating point itself, and leaves those weights in the type of the file.
    """
    for weight in model.parameters():
        if weight.is_floating_point() and weight.dtype.itemsize > 1:
            weight.data = weight.data.to(dtype)


def _read_tokenizer(folder: Path, gguf: str | None = None) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    with quiet(), refusing(f"the tokenizer in {folder}"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, gguf_file=gguf, **_LOCAL)
    return tokenizer
