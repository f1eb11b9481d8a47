"""Keys and values as 4-bit integers in groups of features, each with a 16-bit scale and offset: `compiled-int4`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from kvcache.caches.contract import Unsupported
from kvcache.compiled.rows import CHUNK, LANES
from kvcache.compiled.words import Packing, as_bfloat16

BITS = 4
LEVELS = Packing(BITS, 8).limit
"""Largest integer, either way."""
WORD = Packing(BITS, 8).per_word
"""Integers in a 32-bit word."""
GROUP = 32
"""Most features of a row that share a scale and an offset (the group size of llama.cpp's q4_1)."""


class Int4Rows(NamedTuple):
    """Integers in 32-bit words (`words.py`), with a scale and an offset for each group of a row's features.

    A feature is `integer * scale + offset` of its group; a group is a whole number of eighths of a row. A key's is that
    and its mean over the first prompt, which is subtracted before: rotary keys have features that are far from zero at
    every position, and the scale of a group is made for the farthest. KL of the logits 3.4e-2 without and 1.9e-2 with
    it (SmolLM2-135M after 512 tokens).
    """

    keys: Tensor
    """`[batch, kv_heads, chunks, CHUNK / LANES, words, LANES]`"""
    key_scales: Tensor
    """`[batch, kv_heads, chunks, groups, CHUNK]`"""
    key_offsets: Tensor
    key_means: Tensor
    """`[batch, kv_heads, chunks, head_dim]`, the same for every chunk."""
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
            like.new_zeros((*shape, CHUNK // LANES, words, LANES), dtype=torch.int32),
            scales(),
            scales(),
            like.new_zeros((*shape, head_dim), dtype=torch.bfloat16),
            like.new_zeros((*shape, CHUNK, words), dtype=torch.int32),
            scales(),
            scales(),
        )

    def first(self, chunks: int) -> Int4Rows:
        return Int4Rows(
            self.keys[:, :, :chunks],
            self.key_scales[:, :, :chunks],
            self.key_offsets[:, :, :chunks],
            self.key_means[:, :, :chunks],
            self.values[:, :, :chunks],
            self.value_scales[:, :, :chunks],
            self.value_offsets[:, :, :chunks],
        )

    def begin(self, keys: Sequence[Tensor]) -> None:
        """Take the mean of `keys` for that of all to come."""
        self.key_means.zero_()
        if keys:
            sums = torch.stack([piece.float().sum(2, keepdim=True) for piece in keys])
            self.key_means.copy_(sums.sum(0) / sum(piece.shape[2] for piece in keys))

    def write(self, chunk: Tensor, place: Tensor, k: Tensor, v: Tensor) -> None:
        groups = self.key_scales.shape[3]
        around = k.float() - self.key_means[:, :, :1].float()
        (key_words, value_words), scales, offsets = quantise(torch.stack([around, v.float()]), groups)
        self.keys[:, :, chunk, place // LANES, :, place % LANES] = key_words.permute(2, 0, 1, 3)
        self.values[:, :, chunk, place] = value_words
        both = (self.key_scales, self.value_scales, scales), (self.key_offsets, self.value_offsets, offsets)
        for of_keys, of_values, (for_keys, for_values) in both:
            of_keys[:, :, chunk, :, place] = for_keys.permute(2, 0, 1, 3)
            of_values[:, :, chunk, :, place] = for_values.permute(2, 0, 1, 3)

    def scores(self, queries: Tensor) -> Tensor:
        groups = self.key_scales.shape[3]
        packing = packing_of(groups)
        factors = torch.stack(packing.factors(queries), dim=3)  # [batch, kv_heads, group, WORD, words]
        reads = [packing.read(self.keys, i) for i in range(WORD)]
        sums = []
        for own in factors.unbind(2):
            products = [read * own[:, :, None, None, i, :, None] for i, read in enumerate(reads)]
            for group in range(groups):
                first, *others = (products[i] for i in eighths(group, groups))
                sums.append(sum(others, first).sum(4))
        by_group = torch.stack(sums, dim=2).flatten(-2).unflatten(2, (-1, groups))
        scale, offset = (part.float().transpose(2, 3).unsqueeze(2) for part in (self.key_scales, self.key_offsets))
        of_query = queries.unflatten(-1, (groups, -1)).sum(-1)[..., None, None]
        of_mean = (queries * self.key_means[:, :, :1].float()).sum(-1)[..., None, None]
        total: Tensor = (by_group * scale + of_query * offset).sum(3) + of_mean
        return total

    def weighted(self, weights: Tensor) -> Tensor:
        groups = self.value_scales.shape[3]
        packing = packing_of(groups)
        scale, offset = (part.float().unsqueeze(2) for part in (self.value_scales, self.value_offsets))
        scaled = weights.unsqueeze(-2) * scale  # [batch, kv_heads, group, chunks, groups, CHUNK]
        offsets = (weights.unsqueeze(-2) * offset).sum((3, 5))
        reads = [packing.read(self.values, i) for i in range(WORD)]
        by_chunk = [
            (own[:, :, :, i // packing.per_part, :, None] * read).sum(3)
            for own in scaled.unbind(2)
            for i, read in enumerate(reads)
        ]
        sums = packing.sums(torch.stack(by_chunk, dim=3).sum(2).unflatten(2, (-1, WORD)))
        summed: Tensor = sums.unflatten(-1, (groups, -1)) + offsets.unsqueeze(-1)
        return summed.flatten(-2)

    def plain(self, end: int) -> tuple[Tensor, Tensor]:
        keys, values = (
            self._wide(rows, scales, offsets).flatten(2, 3)[:, :, :end]
            for rows, scales, offsets in (
                (self.keys.transpose(-1, -2).flatten(3, 4), self.key_scales, self.key_offsets),
                (self.values, self.value_scales, self.value_offsets),
            )
        )
        return keys + self.key_means[:, :, :1].float(), values

    def with_own(self, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.first(-(-start // CHUNK)).plain(start)
        return torch.cat([keys.to(k.dtype), k], dim=2), torch.cat([values.to(v.dtype), v], dim=2)

    @staticmethod
    def _wide(rows: Tensor, scales: Tensor, offsets: Tensor) -> Tensor:
        """Return `[batch, kv_heads, chunks, CHUNK, head_dim]` in float32 from `rows [..., CHUNK, words]`."""
        groups = scales.shape[3]
        integers = packing_of(groups).unpack(rows).unflatten(-1, (groups, -1))
        scale, offset = (part.float().transpose(-1, -2).unsqueeze(-1) for part in (scales, offsets))
        wide: Tensor = integers * scale + offset
        return wide.flatten(-2)


def groups_of(head_dim: int) -> int:
    """Return into how many groups a row of `head_dim` features falls: the fewest of at most GROUP features each."""
    return next(groups for groups in (1, 2, 4, 8) if head_dim // groups <= GROUP or groups == WORD)


def packing_of(groups: int) -> Packing:
    """Return how words are divided whose rows have this many groups."""
    return Packing(BITS, WORD // groups)


def eighths(group: int, groups: int) -> range:
    """Return which eighths of a row belong to a group."""
    return range(group * WORD // groups, (group + 1) * WORD // groups)


def quantise(rows: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pack `rows [..., features]`; return words `[..., features / WORD]`, int32, scales and offsets `[..., groups]`.

    The offset is the middle of a group, and the feature that is farthest from it becomes LEVELS, either way; the
    rounding is by scale and offset as they are stored.
    """
    wide = rows.float().unflatten(-1, (groups, -1))
    low, high = wide.amin(-1), wide.amax(-1)
    middle = as_bfloat16((low + high) / 2)
    scales = as_bfloat16(torch.maximum(high - middle, middle - low) / LEVELS)
    steps = scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
    integers = ((wide - middle.unsqueeze(-1)) / steps).round().clamp(-LEVELS, LEVELS).to(torch.int32)
    return packing_of(groups).pack(integers.flatten(-2)), scales.to(torch.bfloat16), middle.to(torch.bfloat16)
