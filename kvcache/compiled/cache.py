"""The cache of `compiled`: rows written in place, and what attends to them.

Axes: `batch` sequences, `q` positions of one forward, `chunks` of CHUNK positions each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from kvcache.compiled.decoder import Layer
from kvcache.compiled.kernels import attend_to_rows, capped
from kvcache.compiled.rows import CHUNK, Rows


class Slot(NamedTuple):
    """A layer and its cache."""

    layer: Layer
    rows: Rows


def seen(positions: Tensor, at: Tensor, window: int | None) -> Tensor:
    """Return whether the query at `at` sees each of `positions`; the two broadcast."""
    before = positions <= at
    return before if window is None else before & (positions > at - window)


def attend_to_cache(slot: Slot, at: Tensor, in_use: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Write `k` and `v` to the row `at [1]`; attend to the chunks whose positions are `in_use [chunks, CHUNK]`."""
    slot.rows.write(at // CHUNK, at % CHUNK, k, v)
    rows = slot.rows.first(in_use.shape[0])
    visible = seen(in_use, at.to(in_use.dtype), slot.layer.window)
    if torch.compiler.is_compiling():
        return attend_to_rows(q, rows, visible, slot.layer.scale, slot.layer.softcap)
    # Run eagerly (to count its operations, say) it is the product that it stands for.
    keys, values = (part.to(q.dtype) for part in rows.plain(in_use.numel()))
    return attend_at_once(slot.layer, q, keys, values, visible.flatten()[None])


def attend_to_prefix(
    slot: Slot,
    start: int,
    mask: Tensor | None,
    q: Tensor,
    own: Sequence[tuple[Tensor, Tensor]],
    *,
    as_stored: bool = False,
) -> Tensor:
    """Attend with `q` to all rows so far, by torch's own kernel.

    `own` are the keys and values of a prompt that begins at `start`, in pieces up to that of `q`; they are written to
    the rows. A prompt attends to its own keys and values as they are, before a format rounds them, unless it is to see
    them `as_stored`. That takes one layer's rows at a time in full width, never the whole cache.
    """
    if as_stored:
        end = start + sum(part.shape[2] for part, _ in own)
        k, v = (part.to(q.dtype) for part in slot.rows.plain(end))
    else:
        k, v = map(joined, zip(*own, strict=True))
        if start:
            k, v = slot.rows.with_own(start, k, v)
    return attend_at_once(slot.layer, q, k, v, mask)


def joined(pieces: Sequence[Tensor]) -> Tensor:
    """Put pieces `[batch, heads, q, head_dim]` one after the other; a single one is not copied."""
    return torch.cat(tuple(pieces), dim=2) if len(pieces) > 1 else pieces[0]


def attend_at_once(layer: Layer, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attend with `q [batch, heads, q, head_dim]` to `k` and `v [batch, kv_heads, n, head_dim]`.

    `mask [q, n]` is true where a query sees a key; None: causal. torch's kernel has no soft-cap, so with one the scores
    are written out, in float32.
    """
    if layer.softcap is None:
        return functional.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=layer.scale, enable_gqa=True
        )
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    grouped = q.unflatten(1, (k.shape[1], -1))
    scores = capped((grouped @ k.unsqueeze(2).mT).float() * layer.scale, layer.softcap)
    weights = scores.masked_fill_(~mask, torch.finfo(scores.dtype).min).softmax(-1).to(q.dtype)
    return (weights @ v.unsqueeze(2)).flatten(1, 2)
