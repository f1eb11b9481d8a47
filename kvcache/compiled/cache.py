"""The cache of `compiled`: keys and values in chunks, written in place, and what attends to them.

Axes: `batch` sequences, `q` positions of one forward, `chunks` of CHUNK positions each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from kvcache.compiled.decoder import Layer
from kvcache.compiled.kernels import CHUNK, attend_to_chunks


class Slot(NamedTuple):
    """A layer and its cache: keys `[batch, kv_heads, chunks, head_dim, CHUNK]`, values `[..., CHUNK, head_dim]`."""

    layer: Layer
    keys: Tensor
    values: Tensor


def write(slot: Slot, rows: tuple[Tensor, Tensor], k: Tensor, v: Tensor) -> None:
    """Store `k` and `v [batch, kv_heads, q, head_dim]` in the cache; `rows`: chunk and place in it, `[q]` each."""
    chunk, place = rows
    slot.keys[:, :, chunk, :, place] = k.permute(2, 0, 1, 3)  # indices that are not neighbours come first
    slot.values[:, :, chunk, place] = v


def seen(positions: Tensor, at: Tensor, window: int | None) -> Tensor:
    """Return whether the query at `at` sees each of `positions`; the two broadcast."""
    before = positions <= at
    return before if window is None else before & (positions > at - window)


def attend_to_cache(slot: Slot, at: Tensor, in_use: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Write `k` and `v` to the row `at [1]`; attend to the chunks whose positions are `in_use [chunks, CHUNK]`."""
    write(slot, (at // CHUNK, at % CHUNK), k, v)
    keys, values = (cache[:, :, : in_use.shape[0]] for cache in (slot.keys, slot.values))
    visible = seen(in_use, at, slot.layer.window)
    if torch.compiler.is_compiling():
        return attend_to_chunks(q * slot.layer.scale, keys, values, visible)
    # Run eagerly (to count its operations, say) it is the product that it stands for.
    return functional.scaled_dot_product_attention(
        q,
        keys.transpose(-1, -2).flatten(2, 3),
        values.flatten(2, 3),
        visible.flatten()[None],
        scale=slot.layer.scale,
        enable_gqa=True,
    )


def attend_to_prefix(
    slot: Slot, rows: tuple[Tensor, Tensor], start: int, mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """Write `k` and `v` to `rows`, those from `start` on; attend to all rows so far, by torch's own kernel."""
    write(slot, rows, k, v)
    if start:
        end = start + k.shape[2]
        k, v = (cache.flatten(2, 3)[:, :, :end] for cache in (slot.keys.transpose(-1, -2), slot.values))
    return functional.scaled_dot_product_attention(
        q, k, v, mask, is_causal=mask is None, scale=slot.layer.scale, enable_gqa=True
    )
