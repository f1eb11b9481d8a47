"""Keys and values as 8-bit integers with one 16-bit scale per token and head: `compiled-int8`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from kvcache.caches.contract import Unsupported
from kvcache.compiled.rows import CHUNK, LANES
from kvcache.compiled.words import Packing, as_bfloat16

PACKING = Packing(bits=8)
LEVELS = PACKING.limit
"""Largest integer, either way."""
WORD = PACKING.per_word


class Int8Rows(NamedTuple):
    """Integers in 32-bit words (`words.py`), and a scale for each row.

    Words and not bytes, because inductor reads eight bytes at a time through a buffer on the stack: attention over
    bytes took 4.9 ms of CPU time where words took 2.0 (AVX2, 8,000 positions, 3 heads of 64 features, 9 queries).
    Scales are bfloat16, which has the range of float32: no row is too small or too large for it.
    """

    keys: Tensor
    """`[batch, kv_heads, chunks, CHUNK / LANES, words, LANES]`"""
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
            like.new_zeros((*shape, CHUNK // LANES, words, LANES), dtype=torch.int32),
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

    def begin(self, queries: Sequence[Tensor], keys: Sequence[Tensor]) -> None:
        """Do nothing: each row has a scale of its own."""

    def write(self, chunk: Tensor, place: Tensor, k: Tensor, v: Tensor) -> None:
        (key_words, value_words), scales = quantise(torch.stack([k, v]))
        self.keys[:, :, chunk, place // LANES, :, place % LANES] = key_words.permute(2, 0, 1, 3)
        self.values[:, :, chunk, place] = value_words
        self.key_scales[:, :, chunk, place], self.value_scales[:, :, chunk, place] = scales

    def scores(self, queries: Tensor) -> Tensor:
        # The scale is left to the loop over all scores, whose shape is the same for scores and for weights.
        return PACKING.scores(queries, self.keys) * self.key_scales.float().unsqueeze(2)

    def weighted(self, weights: Tensor) -> Tensor:
        return PACKING.weighted(weights * self.value_scales.float().unsqueeze(2), self.values)

    def plain(self, end: int) -> tuple[Tensor, Tensor]:
        keys, values = (
            (PACKING.unpack(rows) * scales.float().unsqueeze(-1)).flatten(2, 3)[:, :, :end]
            for rows, scales in (
                (self.keys.transpose(-1, -2).flatten(3, 4), self.key_scales),
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
    scales = as_bfloat16(wide.abs().amax(-1) / LEVELS)
    steps = scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
    integers = (wide / steps).round().clamp(-LEVELS, LEVELS).to(torch.int32)
    return PACKING.pack(integers), scales.to(torch.bfloat16)
