"""Keys and values as 8-bit integers with one 16-bit scale per token and head: `compiled-int8`."""

from __future__ import annotations

import functools
from typing import NamedTuple, Self

import torch
from torch import Tensor

from kvcache.caches.contract import Unsupported
from kvcache.compiled.rows import CHUNK, weighted_sum

LEVELS = 127
"""Largest integer, either way."""
WORD = 4
"""Integers in a 32-bit word."""


class Int8Rows(NamedTuple):
    """Integers packed in 32-bit words: word i of a row holds the features i, i + words, i + 2 words, i + 3 words.

    Words and not bytes, because inductor reads eight bytes at a time through a buffer on the stack: attention over
    bytes took 4.9 ms of CPU time where words took 2.0 (AVX2, 8,000 positions, 3 heads of 64 features, 9 queries).
    Scales are bfloat16, which has the range of float32: no row is too small or too large for it.
    """

    keys: Tensor
    """`[batch, kv_heads, chunks, words, CHUNK]`"""
    key_scales: Tensor
    """`[batch, kv_heads, chunks, CHUNK]`"""
    values: Tensor
    """`[batch, kv_heads, chunks, CHUNK, words]`"""
    value_scales: Tensor
    """`[batch, kv_heads, chunks, CHUNK]`"""

    @classmethod
    def empty(cls, like: Tensor, batch_size: int, kv_heads: int, chunks: int, head_dim: int) -> Self:
        if head_dim % WORD:
            raise Unsupported(f"compiled-int8 packs {WORD} features in a word; this model's heads have {head_dim}")
        shape, words = (batch_size, kv_heads, chunks), head_dim // WORD
        return cls(
            like.new_zeros((*shape, words, CHUNK), dtype=torch.int32),
            like.new_zeros((*shape, CHUNK), dtype=torch.bfloat16),
            like.new_zeros((*shape, CHUNK, words), dtype=torch.int32),
            like.new_zeros((*shape, CHUNK), dtype=torch.bfloat16),
        )

    def first(self, chunks: int) -> Int8Rows:
        return Int8Rows(
            self.keys[:, :, :chunks],
            self.key_scales[:, :, :chunks],
            self.values[:, :, :chunks],
            self.value_scales[:, :, :chunks],
        )

    def write(self, chunk: Tensor, place: Tensor, k: Tensor, v: Tensor) -> None:
        words, self.key_scales[:, :, chunk, place] = quantise(k)
        self.keys[:, :, chunk, :, place] = words.permute(2, 0, 1, 3)
        self.values[:, :, chunk, place], self.value_scales[:, :, chunk, place] = quantise(v)

    def scores(self, query: Tensor) -> Tensor:
        parts = query.unsqueeze(-1).chunk(WORD, dim=3)
        products = [unpack(self.keys, i) * part for i, part in enumerate(parts)]
        return sum(products[1:], products[0]).sum(3) * self.key_scales.float()

    def weighted(self, weights: Tensor) -> Tensor:
        scaled = weights * self.value_scales.float().unsqueeze(2)
        return torch.cat([weighted_sum(scaled, unpack(self.values, i)) for i in range(WORD)], dim=-1)

    def plain(self, end: int) -> tuple[Tensor, Tensor]:
        keys, values = (
            (torch.cat([unpack(rows, i) for i in range(WORD)], dim=-1) * scales.float().unsqueeze(-1)).flatten(2, 3)[
                :, :, :end
            ]
            for rows, scales in (
                (self.keys.transpose(-1, -2), self.key_scales),
                (self.values, self.value_scales),
            )
        )
        return keys, values

    def with_own(self, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.first(-(-start // CHUNK)).plain(start)
        return torch.cat([keys.to(k.dtype), k], dim=2), torch.cat([values.to(v.dtype), v], dim=2)


def quantise(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Pack `rows [..., features]`; return the words `[..., features / WORD]`, int32, and the scales `[...]`.

    A row's largest magnitude becomes LEVELS; the rounding is by the scale as it is stored.
    """
    wide = rows.float()
    scales = (wide.abs().amax(-1) / LEVELS).to(torch.bfloat16)
    steps = scales.float().clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
    integers = (wide / steps).round().clamp(-LEVELS, LEVELS).to(torch.int32)
    words = [(part & 0xFF) << (8 * i) for i, part in enumerate(integers.chunk(WORD, dim=-1))]
    return functools.reduce(torch.bitwise_or, words), scales


def unpack(words: Tensor, i: int) -> Tensor:
    """Return the i-th integer of every word as float32, its sign kept."""
    return ((words << (24 - 8 * i)) >> 24).float()
