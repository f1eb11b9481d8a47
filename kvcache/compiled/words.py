"""Small integers in 32-bit words, made so that a vector of them becomes float32 by one shift and one conversion.

A word is the sum of its integers, `sum(s[i] << bits * i)`, with borrows, not their bits side by side. Shifted left
until integer i is at the top, it reads as one signed number: `s[i]`, and the integers below it as a fraction of less
than a half. That fraction is not removed from each element. A sum over words is linear in it, so it is removed once:
from the query beforehand (`factors`), or from the weighted values afterwards (`sums`). Bits side by side cost a shift
or a mask more for every integer.

Integers that have different scales must not borrow from each other. They are in different parts of a word: a part holds
`per_part` integers, and its borrow ends with it.
"""

from __future__ import annotations

import functools
import operator
from typing import NamedTuple

import torch
from torch import Tensor

WORD_BITS = 32


class Packing(NamedTuple):
    """How a word is divided: integers of `bits` each, `per_part` of them in a part."""

    bits: int
    per_part: int

    @property
    def per_word(self) -> int:
        """Integers in a word."""
        return WORD_BITS // self.bits

    @property
    def limit(self) -> int:
        """Largest integer, either way: with all its fractions it must stay below half of `1 << bits`."""
        return (1 << self.bits - 1) - 1

    @property
    def unit(self) -> float:
        """What a one reads as when it is at the top of a word."""
        return float(1 << WORD_BITS - self.bits)

    def starts_part(self, i: int) -> bool:
        """Return whether integer i is the lowest of its part."""
        return i % self.per_part == 0

    def pack(self, integers: Tensor) -> Tensor:
        """Pack `integers [..., features]`, int32 within `limit`: `[..., features / per_word]`.

        Word w holds the features w, w + words, w + 2 words and so on, in this order from its lowest bits.
        """
        shifted = [part << self.bits * (i % self.per_part) for i, part in enumerate(integers.chunk(self.per_word, -1))]
        parts = [
            functools.reduce(operator.add, shifted[first : first + self.per_part])
            for first in range(0, self.per_word, self.per_part)
        ]
        if len(parts) == 1:
            return parts[0]
        width = self.bits * self.per_part
        masked = [(part & (1 << width) - 1) << width * i for i, part in enumerate(parts)]
        return functools.reduce(operator.or_, masked)

    def read(self, words: Tensor, i: int) -> Tensor:
        """Return integer i of every word as float32 in units of `unit`, with those below it as its fraction."""
        return self._at_top(words, i).float()

    def unpack(self, words: Tensor) -> Tensor:
        """Return the integers `[..., features]` of `words [..., features / per_word]` as float32, exactly."""
        half, down = 1 << WORD_BITS - self.bits - 1, WORD_BITS - self.bits
        return torch.cat([(self._at_top(words, i) + half >> down).float() for i in range(self.per_word)], dim=-1)

    def factors(self, query: Tensor) -> list[Tensor]:
        """Return what to multiply each `read` with, so that the sum is `query [..., features]` times the integers."""
        parts = query.chunk(self.per_word, dim=-1)
        return [
            (part if i + 1 == self.per_word or self.starts_part(i + 1) else part - parts[i + 1] / (1 << self.bits))
            / self.unit
            for i, part in enumerate(parts)
        ]

    def sums(self, of_reads: Tensor) -> Tensor:
        """Turn sums of reads, `[..., per_word, words]`, into sums of the integers, `[..., features]`."""
        parts = of_reads.unbind(-2)
        exact = [
            part if self.starts_part(i) else part - parts[i - 1] / (1 << self.bits) for i, part in enumerate(parts)
        ]
        return torch.cat(exact, dim=-1) / self.unit

    def _at_top(self, words: Tensor, i: int) -> Tensor:
        """Shift integer i to the top, and out of the way what is above it or in parts below its own."""
        below = self.bits * (i - i % self.per_part)
        own = words if below == 0 else words & -(1 << below)
        up = WORD_BITS - self.bits * (i + 1)
        return own << up if up else own


def as_bfloat16(numbers: Tensor) -> Tensor:
    """Round float32 `numbers` to the precision of bfloat16, in which scales are stored; the result is float32.

    By their bits, because inductor leaves a conversion to bfloat16 and back out: a compiled step then rounded a row by
    another scale than the one it stored, and the row came back up to 0.4 % off.
    """
    return ((numbers.view(torch.int32) + 0x8000) & -0x10000).view(torch.float32)
