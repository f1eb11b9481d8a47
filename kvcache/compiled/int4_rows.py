"""Keys and values as 4-bit integers in groups of features, each with a 16-bit scale and offset: `compiled-int4`."""

from __future__ import annotations

import functools
from typing import NamedTuple, Self

import torch
from torch import Tensor

from kvcache.caches.contract import Unsupported
from kvcache.compiled.rows import CHUNK, weighted_sum

LEVELS = 15
"""Largest integer; the smallest is 0."""
WORD = 8
"""Integers in a 32-bit word."""
GROUP = 32
"""Most features of a row that share a scale and an offset (the group size of llama.cpp's q4_1)."""


class Int4Rows(NamedTuple):
    """Integers packed in 32-bit words: word i of a row holds the features i, i + words, ..., i + 7 words.

    A feature is `integer * scale + offset` of its group; a group is a whole number of eighths of a row.
    """

    keys: Tensor
    """`[batch, kv_heads, chunks, words, CHUNK]`"""
    key_scales: Tensor
    """`[batch, kv_heads, chunks, groups, CHUNK]`"""
    key_offsets: Tensor
    values: Tensor
    """`[batch, kv_heads, chunks, CHUNK, words]`"""
    value_scales: Tensor
    """`[batch, kv_heads, chunks, groups, CHUNK]`"""
    value_offsets: Tensor

    @classmethod
    def empty(cls, like: Tensor, batch_size: int, kv_heads: int, chunks: int, head_dim: int) -> Self:
        if head_dim % WORD:
            raise Unsupported(f"compiled-int4 packs {WORD} features in a word; this model's heads have {head_dim}")
        shape, words, groups = (batch_size, kv_heads, chunks), head_dim // WORD, groups_of(head_dim)

        def scales() -> Tensor:
            return like.new_zeros((*shape, groups, CHUNK), dtype=torch.bfloat16)

        return cls(
            like.new_zeros((*shape, words, CHUNK), dtype=torch.int32),
            scales(),
            scales(),
            like.new_zeros((*shape, CHUNK, words), dtype=torch.int32),
            scales(),
            scales(),
        )

    def first(self, chunks: int) -> Int4Rows:
        return Int4Rows(
            self.keys[:, :, :chunks],
            self.key_scales[:, :, :chunks],
            self.key_offsets[:, :, :chunks],
            self.values[:, :, :chunks],
            self.value_scales[:, :, :chunks],
            self.value_offsets[:, :, :chunks],
        )

    def write(self, chunk: Tensor, place: Tensor, k: Tensor, v: Tensor) -> None:
        groups = self.key_scales.shape[3]
        words, scales, offsets = quantise(k, groups)
        self.keys[:, :, chunk, :, place] = words.permute(2, 0, 1, 3)
        self.key_scales[:, :, chunk, :, place] = scales.permute(2, 0, 1, 3)
        self.key_offsets[:, :, chunk, :, place] = offsets.permute(2, 0, 1, 3)
        words, scales, offsets = quantise(v, groups)
        self.values[:, :, chunk, place] = words
        self.value_scales[:, :, chunk, :, place] = scales.permute(2, 0, 1, 3)
        self.value_offsets[:, :, chunk, :, place] = offsets.permute(2, 0, 1, 3)

    def scores(self, query: Tensor) -> Tensor:
        groups = self.key_scales.shape[3]
        parts = query.unsqueeze(-1).chunk(WORD, dim=3)
        total = None
        for group, own in enumerate(query.chunk(groups, dim=3)):
            products = [unpack(self.keys, i) * parts[i] for i in eighths(group, groups)]
            score = sum(products[1:], products[0]).sum(3) * self.key_scales[:, :, :, group].float()
            score = score + self.key_offsets[:, :, :, group].float() * own.sum(3, keepdim=True)
            total = score if total is None else total + score
        assert total is not None
        return total

    def weighted(self, weights: Tensor) -> Tensor:
        groups = self.value_scales.shape[3]
        sums = []
        for group in range(groups):
            scaled = weights * self.value_scales[:, :, :, group].float().unsqueeze(2)
            offset = (weights * self.value_offsets[:, :, :, group].float().unsqueeze(2)).sum((-2, -1)).unsqueeze(-1)
            sums += [weighted_sum(scaled, unpack(self.values, i)) + offset for i in eighths(group, groups)]
        return torch.cat(sums, dim=-1)

    def plain(self, end: int) -> tuple[Tensor, Tensor]:
        keys, values = (
            self._wide(rows, scales, offsets).flatten(2, 3)[:, :, :end]
            for rows, scales, offsets in (
                (self.keys.transpose(-1, -2), self.key_scales, self.key_offsets),
                (self.values, self.value_scales, self.value_offsets),
            )
        )
        return keys, values

    def with_own(self, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.first(-(-start // CHUNK)).plain(start)
        return torch.cat([keys.to(k.dtype), k], dim=2), torch.cat([values.to(v.dtype), v], dim=2)

    @staticmethod
    def _wide(rows: Tensor, scales: Tensor, offsets: Tensor) -> Tensor:
        """Return `[batch, kv_heads, chunks, CHUNK, head_dim]` in float32 from `rows [..., CHUNK, words]`."""
        integers = torch.cat([unpack(rows, i) for i in range(WORD)], dim=-1).unflatten(-1, (scales.shape[3], -1))
        scale, offset = (part.float().transpose(-1, -2).unsqueeze(-1) for part in (scales, offsets))
        wide: Tensor = integers * scale + offset
        return wide.flatten(-2)


def groups_of(head_dim: int) -> int:
    """Return into how many groups a row of `head_dim` features falls: the fewest of at most GROUP features each."""
    return next(groups for groups in (1, 2, 4, 8) if head_dim // groups <= GROUP or groups == WORD)


def eighths(group: int, groups: int) -> range:
    """Return which eighths of a row belong to a group."""
    return range(group * WORD // groups, (group + 1) * WORD // groups)


def quantise(rows: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pack `rows [..., features]`; return words `[..., features / WORD]`, int32, scales and offsets `[..., groups]`.

    A group's smallest feature becomes 0 and its largest LEVELS; the rounding is by scale and offset as they are stored.
    """
    wide = rows.float().unflatten(-1, (groups, -1))
    low, high = wide.amin(-1), wide.amax(-1)
    offsets = low.to(torch.bfloat16)
    scales = ((high - offsets.float()) / LEVELS).to(torch.bfloat16)
    steps = scales.float().clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
    integers = ((wide - offsets.float().unsqueeze(-1)) / steps).round().clamp(0, LEVELS).to(torch.int32).flatten(-2)
    words = [part << (4 * i) for i, part in enumerate(integers.chunk(WORD, dim=-1))]
    return functools.reduce(torch.bitwise_or, words), scales, offsets


def unpack(words: Tensor, i: int) -> Tensor:
    """Return the i-th integer of every word as float32."""
    return ((words >> (4 * i)) & LEVELS).float()
