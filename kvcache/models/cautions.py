"""What a user should know of a checkpoint that is read without an error: it may not compute what its author meant."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FLOAT8 = {"F8_E4M3", "F8_E5M2"}
"""safetensors' names of 8-bit floating-point numbers."""

_GGUF_HEADER_BYTES = 1 << 26
"""The header, with all tokens of a large vocabulary, lies within the first 64 MB of a GGUF file."""
_GGUF_STRING = 8
"""GGUF's number of the type of a string: 8 bytes of length and the text follow."""


def of_gguf(path: Path) -> Iterator[str]:
    """Yield what transformers leaves out when it reads the GGUF file at `path`: any scaling of the rotary positions."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        key = b".rope.scaling.type"
        at = content.find(key, 0, _GGUF_HEADER_BYTES)
        read_by_transformers = content[max(0, at - 7) : at] == b"gpt-oss"
        scaling = _string_at(content, at + len(key)) if at > 0 and not read_by_transformers else "none"
        if scaling == "none" and content.find(b"rope_freqs.weight", 0, _GGUF_HEADER_BYTES) > 0:
            scaling = "llama3"
    if scaling != "none":
        yield (
            f"{path.name} scales its rotary positions ({scaling}), which transformers ignores in a GGUF file: its "
            "times are right, and its text beyond the original context length is not the model's"
        )


def of_safetensors(weights: tuple[Path, ...], bare: PreTrainedModel) -> Iterator[str]:
    """Yield what differs between safetensors files and the model without weights that their config.json describes."""
    from safetensors import safe_open

    with ExitStack() as stack:
        holders: dict[str, Any] = {}
        for path in weights:
            file = stack.enter_context(safe_open(path, framework="pt"))
            holders |= dict.fromkeys(file.keys(), file)
        yield from _of_float8(holders, quantised=getattr(bare.config, "quantization_config", None) is not None)
        yield from _of_ties(holders, getattr(bare, "all_tied_weights_keys", {}))


def _of_float8(holders: Mapping[str, Any], *, quantised: bool) -> Iterator[str]:
    bare = [name for name, file in holders.items() if file.get_slice(name).get_dtype() in FLOAT8]
    if bare and not quantised:
        yield (
            f"{len(bare)} tensors are stored in 8-bit floating point without scales (config.json has no "
            f"quantization_config), {bare[0]} among them: their numbers are converted as they are"
        )


def _of_ties(holders: Mapping[str, Any], tied: Mapping[str, str]) -> Iterator[str]:
    for target, source in tied.items():
        if target not in holders or source not in holders:
            continue
        one, other = (holders[name].get_tensor(name) for name in (target, source))
        if one.shape != other.shape or not bool((one == other).all()):
            yield (
                f"config.json ties {target} to {source}, and the file holds two different matrices: transformers uses "
                "both, so the weights are larger than the configuration says"
            )


def _string_at(content: mmap.mmap, at: int) -> str:
    """Read a GGUF value that is a string; "none" where it is of another type."""
    if int.from_bytes(content[at : at + 4], "little") != _GGUF_STRING:
        return "none"
    size = int.from_bytes(content[at + 4 : at + 12], "little")
    return content[at + 12 : at + 12 + size].decode(errors="replace")
