"""How `compiled` stores a layer's keys and values: the contract of a format, and the format that rounds nothing.

Rows lie in chunks of CHUNK positions, axis 2 of every tensor. Keys have their positions last, so that a score needs no
sum across the lanes of a vector; values have their features last. A format is a tuple of tensors, so that compiled code
takes it as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

CHUNK = 64
"""Cached positions that one partial sum of attention covers: a chunk's keys or values stay in the first-level cache."""


class Rows(Protocol):
    """Keys and values of one layer; a tuple of tensors `[batch, kv_heads, chunks, ...]`."""

    @property
    def keys(self) -> Tensor:
        """Return the keys as they are stored."""

    def __iter__(self) -> Iterator[Tensor]:
        """Iterate over all tensors."""

    @classmethod
    def empty(cls, like: Tensor, batch_size: int, kv_heads: int, chunks: int, head_dim: int) -> Self:
        """Make rows of zeros on the device of `like`, for keys and values of its dtype.

        Raises:
            Unsupported: the format has no place for heads of this size.
        """

    def first(self, chunks: int) -> Self:
        """Return the first chunks, without copying."""

    def write(self, chunk: Tensor, place: Tensor, k: Tensor, v: Tensor) -> None:
        """Store `k` and `v [batch, kv_heads, q, head_dim]` at positions `chunk [q]` and `place [q]` within it."""

    def scores(self, query: Tensor) -> Tensor:
        """Multiply `query [batch, kv_heads, 1, head_dim]` with all keys: `[batch, kv_heads, chunks, CHUNK]`."""

    def weighted(self, weights: Tensor) -> Tensor:
        """Sum all values by `weights [batch, kv_heads, group, chunks, CHUNK]`: `[batch, kv_heads, group, head_dim]`.

        The queries of a group are separate expressions over one loop, so that values are read once for all of them;
        each chunk gives a sum of its own, so that threads share the work.
        """

    def plain(self, end: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of the first `end` positions, `[batch, kv_heads, end, head_dim]` each."""

    def with_own(self, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the positions before `start` as `plain` does, and after them `k` and `v` as they were written."""


class ExactRows(NamedTuple):
    """Keys and values in the model's dtype."""

    keys: Tensor
    """`[batch, kv_heads, chunks, head_dim, CHUNK]`"""
    values: Tensor
    """`[batch, kv_heads, chunks, CHUNK, head_dim]`"""

    @classmethod
    def empty(cls, like: Tensor, batch_size: int, kv_heads: int, chunks: int, head_dim: int) -> Self:
        shape = (batch_size, kv_heads, chunks)
        # Zeroes come from the kernel untouched: memory is taken as tokens arrive.
        return cls(like.new_zeros((*shape, head_dim, CHUNK)), like.new_zeros((*shape, CHUNK, head_dim)))

    def first(self, chunks: int) -> ExactRows:
        return ExactRows(self.keys[:, :, :chunks], self.values[:, :, :chunks])

    def write(self, chunk: Tensor, place: Tensor, k: Tensor, v: Tensor) -> None:
        self.keys[:, :, chunk, :, place] = k.permute(2, 0, 1, 3)  # indices that are not neighbours come first
        self.values[:, :, chunk, place] = v

    def scores(self, query: Tensor) -> Tensor:
        return (self.keys.float() * query.unsqueeze(-1)).sum(3)

    def weighted(self, weights: Tensor) -> Tensor:
        return weighted_sum(weights, self.values.float())

    def plain(self, end: int) -> tuple[Tensor, Tensor]:
        keys, values = (rows.flatten(2, 3)[:, :, :end] for rows in (self.keys.transpose(-1, -2), self.values))
        return keys, values

    def with_own(self, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.plain(start + k.shape[2])  # the own rows are stored as they were


def weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    """Sum `values [batch, kv_heads, chunks, CHUNK, features]` by weights `[batch, kv_heads, group, chunks, CHUNK]`."""
    by_chunk = [(weights[:, :, i].unsqueeze(-1) * values).sum(3) for i in range(weights.shape[2])]
    return torch.stack(by_chunk, dim=2).sum(3)
