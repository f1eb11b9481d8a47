"""Keys and values as 4-bit integers, balanced and mixed before they are rounded: `compiled-int4`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from kvcache.caches.contract import Unsupported
from kvcache.compiled.rows import CHUNK, LANES
from kvcache.compiled.words import Packing, as_bfloat16

PACKING = Packing(bits=4)
LEVELS = PACKING.limit
"""Largest integer, either way."""
WORD = PACKING.per_word
"""Integers in a 32-bit word."""
SHARES = (1.0, 0.93, 0.86, 0.8)
"""Scales that are tried for a row, as shares of the one at which its largest magnitude is the largest integer."""
FEWEST_BALANCED = 8
"""Positions of a first prompt from which keys are balanced: of two or three, mean and first key leave only rounding."""


class Int4Rows(NamedTuple):
    """Integers in 32-bit words (`words.py`), and a scale for each row.

    A row is rounded after its features are mixed (`mixed`), so that none of them alone decides about the scale. What a
    first prompt shows of all keys is subtracted before: their mean, since rotary keys have features that are far from
    zero at every position, and a share of the first key, which is unlike the others and to which all queries attend.
    The rest is balanced, multiplied by what the query is divided by, so that those features lose least that meet the
    largest queries.
    """

    keys: Tensor
    """`[batch, kv_heads, chunks, CHUNK / LANES, words, LANES]`"""
    key_scales: Tensor
    """`[batch, kv_heads, chunks, CHUNK]`"""
    key_shares: Tensor
    """How much of the first key is in each one, `[batch, kv_heads, chunks, CHUNK]`."""
    key_means: Tensor
    """`[batch, kv_heads, chunks, head_dim]`, as are the next two; the same for every chunk."""
    key_factors: Tensor
    """What balances keys."""
    key_firsts: Tensor
    """The first key without the mean, balanced."""
    values: Tensor
    """`[batch, kv_heads, chunks, CHUNK, words]`"""
    value_scales: Tensor
    """`[batch, kv_heads, chunks, CHUNK]`"""

    @classmethod
    def empty(cls, like: Tensor, batch_size: int, kv_heads: int, chunks: int, head_dim: int) -> Self:
        if head_dim % WORD:
            raise Unsupported(f"compiled-int4 packs {WORD} features in a word; this model's heads have {head_dim}")
        shape, words = (batch_size, kv_heads, chunks), head_dim // WORD

        def zeros(*own: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return like.new_zeros((*shape, *own), dtype=dtype)

        return cls(
            keys=zeros(CHUNK // LANES, words, LANES, dtype=torch.int32),
            key_scales=zeros(CHUNK),
            key_shares=zeros(CHUNK),
            key_means=zeros(head_dim),
            key_factors=zeros(head_dim) + 1,
            key_firsts=zeros(head_dim),
            values=zeros(CHUNK, words, dtype=torch.int32),
            value_scales=zeros(CHUNK),
        )

    def first(self, chunks: int) -> Int4Rows:
        return Int4Rows(*(tensor[:, :, :chunks] for tensor in self))

    def begin(self, queries: Sequence[Tensor], keys: Sequence[Tensor]) -> None:
        """Take the mean of `keys` and the first of them, and the factors that balance the rest."""
        self.key_means.zero_()
        self.key_factors.fill_(1)
        self.key_firsts.zero_()
        if not keys:
            return
        self.key_means.copy_(mean(keys))
        self.key_firsts.copy_(self._balanced(keys[0][:, :, :1]))
        if sum(piece.shape[2] for piece in keys) < FEWEST_BALANCED:
            return
        rests = [balanced - share * self._of_all(self.key_firsts) for balanced, share in map(self._parts, keys)]
        spread = mean([rest.square() for rest in rests])
        asked = mean([piece.float().square().unflatten(1, (spread.shape[1], -1)).mean(2) for piece in queries])
        self.key_factors.copy_(balance(asked, spread))
        self.key_firsts.copy_(self._balanced(keys[0][:, :, :1]))

    def write(self, chunk: Tensor, place: Tensor, k: Tensor, v: Tensor) -> None:
        balanced, share = self._parts(k)
        rest = balanced - share * self._of_all(self.key_firsts)
        (key_words, value_words), scales = quantise(mixed(torch.stack([rest, v.float()])))
        self.keys[:, :, chunk, place // LANES, :, place % LANES] = key_words.permute(2, 0, 1, 3)
        self.values[:, :, chunk, place] = value_words
        self.key_scales[:, :, chunk, place], self.value_scales[:, :, chunk, place] = scales
        self.key_shares[:, :, chunk, place] = share[..., 0].to(torch.bfloat16)

    def scores(self, queries: Tensor) -> Tensor:
        balanced = queries / self._of_all(self.key_factors)
        of_mean, of_first = (
            (query * self._of_all(part)).sum(-1)[..., None, None]
            for query, part in ((queries, self.key_means), (balanced, self.key_firsts))
        )
        scales, shares = (part.float().unsqueeze(2) for part in (self.key_scales, self.key_shares))
        return PACKING.scores(mixed(balanced), self.keys) * scales + (shares * of_first + of_mean)

    def weighted(self, weights: Tensor) -> Tensor:
        return mixed(PACKING.weighted(weights * self.value_scales.float().unsqueeze(2), self.values))

    def plain(self, end: int) -> tuple[Tensor, Tensor]:
        rests, values = (
            mixed(PACKING.unpack(rows) * scales.float().unsqueeze(-1)).flatten(2, 3)[:, :, :end]
            for rows, scales in (
                (self.keys.transpose(-1, -2).flatten(3, 4), self.key_scales),
                (self.values, self.value_scales),
            )
        )
        shares = self.key_shares.float().flatten(2)[:, :, :end, None]
        balanced = rests + shares * self._of_all(self.key_firsts)
        return balanced / self._of_all(self.key_factors) + self._of_all(self.key_means), values

    def with_own(self, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.first(-(-start // CHUNK)).plain(start)
        return torch.cat([keys.to(k.dtype), k], dim=2), torch.cat([values.to(v.dtype), v], dim=2)

    @staticmethod
    def _of_all(by_chunk: Tensor) -> Tensor:
        """Return what is the same for every chunk, `[batch, kv_heads, 1, head_dim]`."""
        return by_chunk[:, :, :1].float()

    def _balanced(self, keys: Tensor) -> Tensor:
        return (keys.float() - self._of_all(self.key_means)) * self._of_all(self.key_factors)

    def _parts(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return `keys [batch, kv_heads, q, head_dim]` balanced, and their shares of the first one, as stored."""
        balanced, first = self._balanced(keys), self._of_all(self.key_firsts)
        least = torch.finfo(torch.float32).tiny  # there may be no first key
        return balanced, as_bfloat16(
            (balanced * first).sum(-1, keepdim=True) / first.square().sum(-1, keepdim=True).clamp(min=least)
        )


def mean(pieces: Sequence[Tensor]) -> Tensor:
    """Average pieces `[batch, heads, q, head_dim]` over all their positions: `[batch, heads, 1, head_dim]`."""
    sums = torch.stack([piece.float().sum(2, keepdim=True) for piece in pieces])
    return sums.sum(0) / sum(piece.shape[2] for piece in pieces)


def balance(queries: Tensor, keys: Tensor) -> Tensor:
    """Return the factors of keys whose rounding moves scores least, from mean squares of queries and keys.

    Rounding moves every balanced feature alike, by a share of the whole row: `sum(queries / f**2) * sum(keys * f**2)`
    is least where `f**4 = queries / keys` (Cauchy-Schwarz).
    """
    floors = (1e-6 * part.mean(-1, keepdim=True) + torch.finfo(torch.float32).tiny for part in (queries, keys))
    q, k = (part + floor for part, floor in zip((queries, keys), floors, strict=True))
    factors = q**0.25 / k**0.25  # the quotient itself may be infinite where all keys are alike
    return factors / factors.mean(-1, keepdim=True)


def mixed(rows: Tensor) -> Tensor:
    """Mix the eighths of `rows [..., features]`, each feature with its seven namesakes; twice gives the same rows.

    A Hadamard matrix of 8 by 8, by sums and differences: the features of a word are those that are mixed. It is
    orthogonal, so a product of mixed rows is that of the rows.
    """
    # Not by slices that are joined again: inductor then chooses between eight sums for every number, and a step after
    # 128 tokens took 1.08 to 1.13 of compiled's time; as it is, 1.00 to 1.04.
    parts = rows.unflatten(-1, (2, 2, 2, -1))
    signs = 1 - 2 * torch.arange(2, device=rows.device)
    for dim in (1, 2, 3):
        parts = parts.flip(-1 - dim) + parts * signs.view(-1, *[1] * dim)
    rows_mixed: Tensor = parts.flatten(-4) * WORD**-0.5
    return rows_mixed


def quantise(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Pack `rows [..., features]`; return the words `[..., features / WORD]`, int32, and the scales `[...]`.

    Of SHARES, each row has the one that brings it back with the smallest sum of squared errors.
    """
    wide = rows.float()
    largest = wide.abs().amax(-1, keepdim=True) / LEVELS
    scales, integers, least = largest, wide, largest
    for share in SHARES:
        step = as_bfloat16(largest * share)
        rounded = (wide / step.clamp(min=torch.finfo(torch.float32).tiny)).round().clamp(-LEVELS, LEVELS)
        error = (rounded * step - wide).square().sum(-1, keepdim=True)
        is_better = error < least if share != SHARES[0] else torch.ones_like(error, dtype=torch.bool)
        scales, integers, least = (
            torch.where(is_better, *pair) for pair in ((step, scales), (rounded, integers), (error, least))
        )
    return PACKING.pack(integers.to(torch.int32)), scales[..., 0].to(torch.bfloat16)
