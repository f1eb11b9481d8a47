"""How `compiled` stores a layer's keys and values: the contract of a format, and the format that rounds nothing.

Rows lie in chunks of CHUNK positions, axis 2 of every tensor. Keys have their positions last, so that a score needs no
sum across the lanes of a vector; values have their features last. Only LANES of them lie side by side, so that the sum
of a few lanes reads memory in order. A format is a tuple of tensors, so that compiled code takes it as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

CHUNK = 64
"""Cached positions that one partial sum of attention covers: a chunk's keys or values stay in the first-level cache."""

LANES = 16
"""Positions of keys, or features of values, side by side: a vector of float32, or two. With all 64 side by side a loop
over the features of eight positions skips 256 bytes at every step: scores over 8,000 float32 keys took 0.97 ms of CPU
time a layer and take 0.60 in order; over 8-bit integers 0.33 and 0.18 (AVX2, 3 heads of 64 features, 9 queries)."""


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

    def begin(self, queries: Sequence[Tensor], keys: Sequence[Tensor]) -> None:
        """Prepare for a sequence that begins with these pieces, `[batch, heads, q, head_dim]`; none: unknown.

        Keys have `kv_heads`, queries a multiple of that.
        """

    def write(self, chunk: Tensor, place: Tensor, k: Tensor, v: Tensor) -> None:
        """Store `k` and `v [batch, kv_heads, q, head_dim]` at positions `chunk [q]` and `place [q]` within it."""

    def scores(self, queries: Tensor) -> Tensor:
        """Multiply `queries [batch, kv_heads, group, head_dim]`, float32, with all keys.

        The queries of a group are separate expressions over one loop, so that keys are read once for all of them.

        Returns:
            `[batch, kv_heads, group, chunks, CHUNK]`
        """

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
    """`[batch, kv_heads, chunks, CHUNK / LANES, head_dim, LANES]`"""
    values: Tensor
    """`[batch, kv_heads, chunks, head_dim / lanes, CHUNK, lanes]`"""

    @classmethod
    def empty(cls, like: Tensor, batch_size: int, kv_heads: int, chunks: int, head_dim: int) -> Self:
        shape, lanes = (batch_size, kv_heads, chunks), math.gcd(head_dim, LANES)
        keys = like.new_zeros((*shape, CHUNK // LANES, head_dim, LANES))
        return cls(keys, like.new_zeros((*shape, head_dim // lanes, CHUNK, lanes)))

    def first(self, chunks: int) -> ExactRows:
        return ExactRows(self.keys[:, :, :chunks], self.values[:, :, :chunks])

    def begin(self, queries: Sequence[Tensor], keys: Sequence[Tensor]) -> None:
        """Do nothing: keys are stored as they are."""

    def write(self, chunk: Tensor, place: Tensor, k: Tensor, v: Tensor) -> None:
        # Indices that are not neighbours come first.
        self.keys[:, :, chunk, place // LANES, :, place % LANES] = k.permute(2, 0, 1, 3)
        self.values[:, :, chunk, :, place] = v.unflatten(-1, (-1, self.values.shape[-1])).permute(2, 0, 1, 3, 4)

    def scores(self, queries: Tensor) -> Tensor:
        keys = self.keys.float()
        by_query = [(keys * query[:, :, None, None, :, None]).sum(4) for query in queries.unbind(2)]
        return torch.stack(by_query, dim=2).flatten(-2)

    def weighted(self, weights: Tensor) -> Tensor:
        values = self.values.float()
        by_chunk = [(own[:, :, :, None, :, None] * values).sum(4) for own in weights.unbind(2)]
        return torch.stack(by_chunk, dim=2).sum(3).flatten(-2)

    def plain(self, end: int) -> tuple[Tensor, Tensor]:
        keys = self.keys.transpose(-1, -2).flatten(2, 4)
        values = self.values.transpose(3, 4).flatten(4).flatten(2, 3)
        return keys[:, :, :end], values[:, :, :end]

    def with_own(self, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.plain(start + k.shape[2])  # the own rows are stored as they were
