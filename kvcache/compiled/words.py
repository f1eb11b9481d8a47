"""Small integers in 32-bit words, made so that a vector of them becomes float32 by one shift and one conversion.

A word is the sum of its integers, `sum(s[i] << bits * i)`, with borrows, not their bits side by side. Shifted left
until integer i is at the top, it reads as one signed number: `s[i]`, and the integers below it as a fraction of less
than a half. That fraction is not removed from each element. A sum over words is linear in it, so it is removed once:
from the query beforehand (`factors`), or from the weighted values afterwards (`sums`). Bits side by side cost a shift
or a mask more for every integer.

All integers of a word have one scale, since they borrow from each other.
"""

from __future__ import annotations

import functools
import operator
from typing import NamedTuple

import torch
from torch import Tensor

WORD_BITS = 32


class Packing(NamedTuple):
    """How a word is divided: integers of `bits` each."""

    bits: int

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

    def pack(self, integers: Tensor) -> Tensor:
        """Pack `integers [..., features]`, int32 within `limit`: `[..., features / per_word]`.

        Word w holds the features w, w + words, w + 2 words and so on, in this order from its lowest bits.
        """
        shifted = [part << self.bits * i for i, part in enumerate(integers.chunk(self.per_word, -1))]
        return functools.reduce(operator.add, shifted)

    def read(self, words: Tensor, i: int) -> Tensor:
        """Return integer i of every word as float32 in units of `unit`, with those below it as its fraction."""
        return self._at_top(words, i).float()

    def unpack(self, words: Tensor) -> Tensor:
        """Return the integers `[..., features]` of `words [..., features / per_word]` as float32, exactly."""
        half, down = 1 << WORD_BITS - self.bits - 1, WORD_BITS - self.bits
        return torch.cat([(self._at_top(words, i) + half >> down).float() for i in range(self.per_word)], dim=-1)

    def factors(self, query: Tensor) -> list[Tensor]:
        """Return what to multiply each `read` with, so that the sum is `query [..., features]` times the integers."""
        *parts, last = query.chunk(self.per_word, dim=-1)
        above = [*parts[1:], last]
        return [(part - up / (1 << self.bits)) / self.unit for part, up in zip(parts, above, strict=True)] + [
            last / self.unit
        ]

    def sums(self, of_reads: Tensor) -> Tensor:
        """Turn sums of reads, `[..., per_word, words]`, into sums of the integers, `[..., features]`."""
        first, *parts = of_reads.unbind(-2)
        below = [first, *parts[:-1]]
        exact = [part - down / (1 << self.bits) for part, down in zip(parts, below, strict=True)]
        return torch.cat([first, *exact], dim=-1) / self.unit

    def scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Multiply `queries [batch, kv_heads, group, head_dim]` with the integers of all keys.

        `keys` are `[batch, kv_heads, chunks, CHUNK / LANES, words, LANES]`.

        Returns:
            `[batch, kv_heads, group, chunks, CHUNK]`
        """
        factors = torch.stack(self.factors(queries), dim=3)  # [batch, kv_heads, group, per_word, words]
        reads = [self.read(keys, i) for i in range(self.per_word)]
        by_query = []
        for own in factors.unbind(2):
            products = [read * own[:, :, None, None, i, :, None] for i, read in enumerate(reads)]
            by_query.append(sum(products[1:], products[0]).sum(4))
        return torch.stack(by_query, dim=2).flatten(-2)

    def weighted(self, weights: Tensor, values: Tensor) -> Tensor:
        """Sum the integers of `values [batch, kv_heads, chunks, CHUNK, words]` by weights.

        `weights` are `[batch, kv_heads, group, chunks, CHUNK]`. The sums of one read stand beside each other, so that a
        loop over few reads, whose sums fit in registers, has those of all queries.

        Returns:
            `[batch, kv_heads, group, head_dim]`
        """
        reads = [self.read(values, i) for i in range(self.per_word)]
        by_chunk = [(own.unsqueeze(-1) * read).sum(3) for read in reads for own in weights.unbind(2)]
        by_read = torch.stack(by_chunk, dim=3).sum(2).unflatten(2, (self.per_word, -1))
        return self.sums(by_read.transpose(2, 3))

    def _at_top(self, words: Tensor, i: int) -> Tensor:
        """Shift integer i to the top, and what is above it out."""
        up = WORD_BITS - self.bits * (i + 1)
        return words << up if up else words


def as_bfloat16(numbers: Tensor) -> Tensor:
    """Round float32 `numbers` to the precision of bfloat16, in which scales are stored; the result is float32.

    By their bits, because inductor leaves a conversion to bfloat16 and back out: a compiled step then rounded a row by
    another scale than the one it stored, and the row came back up to 0.4 % off.
    """
    return ((numbers.view(torch.int32) + 0x8000) & -0x10000).view(torch.float32)
