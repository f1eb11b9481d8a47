"""Single values out of a GGUF file's header, found by their names: a whole parse takes seconds for a large vocabulary.

A name and a string lie in the file as 8 bytes of length and the text, so no other text is taken for one.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_HEADER_BYTES = 1 << 26
"""The header, with all tokens of a large vocabulary, lies within the first 64 MB."""
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
"""GGUF's numbers of the types of numbers, in the words of `struct`."""
_STRING = 8


def rotary_scaling(path: Path) -> str | None:
    """Return how the model in `path` scales its rotary positions, where transformers does not read that; else None.

    As llama.cpp reads it: a factor without a kind is linear, a factor of 0 or 1 none, and the tables of Llama 3's and
    of longrope are tensors.
    """
    with _mapped(path) as content:
        architecture = _value(content, "general.architecture")
        if architecture == "gpt-oss":  # the one of which transformers reads the scaling
            return None
        kind = _value(content, f"{architecture}.rope.scaling.type") or "linear"
        factor = _value(content, f"{architecture}.rope.scaling.factor")
        factor = _value(content, f"{architecture}.rope.scale_linear") if factor is None else factor
        if kind == "longrope" or _find(content, "rope_factors_long.weight") > 0:
            return "longrope"
        if kind != "none" and factor not in (None, 0, 1):
            return str(kind)
        return "llama3" if _find(content, "rope_freqs.weight") > 0 else None


def part_count(path: Path) -> int:
    """Return how many files the model is split into, of which `path` is one."""
    with _mapped(path) as content:
        return int(_value(content, "split.count") or 1)


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        yield content


def _find(content: mmap.mmap, name: str) -> int:
    """Return where the text of `name` ends; a negative number where it is not."""
    word = struct.pack("<Q", len(name)) + name.encode()
    at = content.find(word, 0, _HEADER_BYTES)
    return at + len(word) if at >= 0 else at


def _value(content: mmap.mmap, name: str) -> str | float | None:
    """Return the string or the number of that name; None where there is none."""
    at = _find(content, name)
    if at < 0:
        return None
    (kind,) = struct.unpack_from("<I", content, at)
    if kind == _STRING:
        (size,) = struct.unpack_from("<Q", content, at + 4)
        return content[at + 12 : at + 12 + size].decode(errors="replace")
    number: float | None = struct.unpack_from(f"<{_FORMATS[kind]}", content, at + 4)[0] if kind in _FORMATS else None
    return number
