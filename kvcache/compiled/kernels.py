"""The arithmetic of `compiled`: plain functions of tensors, run eagerly over a prompt and compiled for a step.

Axes: `batch` sequences, `q` positions of one forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from kvcache.compiled.products import product
from kvcache.compiled.rows import Rows

if TYPE_CHECKING:
    from kvcache.compiled.decoder import Head, Layer, Norm, Rotary

Activation = Callable[[Tensor], Tensor]
"""It may write its result over its argument."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`q [batch, heads, q, head_dim]`, `k` and `v [batch, kv_heads, q, head_dim]` -> `[batch, heads, q, head_dim]`."""


def block(x: Tensor, layer: Layer, rotaries: tuple[Rotary, ...], attend: Attend, activation: Activation) -> Tensor:
    """One layer over `x [batch, q, hidden]`; `rotaries` are the model's tables at its q positions."""
    return after_attention(x, attend(*heads(x, layer, rotaries)), layer, activation)


def heads(x: Tensor, layer: Layer, rotaries: tuple[Rotary, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Make queries, keys and values `[batch, heads, q, head_dim]` of `x [batch, q, hidden]`: a layer's first part."""
    h = normalise(x, layer.attention_norm)
    q, k, v = layer.split(tuple(product(h, part).contiguous() for part in layer.qkv), layer.head_dim)
    q, k = normalise(q, layer.q_norm), normalise(k, layer.k_norm)
    if layer.rotary is not None:
        q, k = (_rotate(part, rotaries[layer.rotary]) for part in (q, k))
    return q, k, v


def after_attention(x: Tensor, attended: Tensor, layer: Layer, activation: Activation) -> Tensor:
    """Go on from `x [batch, q, hidden]` and `attended [batch, heads, q, head_dim]`: a layer's second part."""
    attended = product(attended.transpose(1, 2).flatten(2), layer.o)
    after = x + times(normalise(attended, layer.attention_output_norm), layer.residual)
    fed = layer.mlp.feed(normalise(x if layer.parallel else after, layer.mlp_norm), activation)
    return after + times(normalise(fed, layer.mlp_output_norm), layer.residual)


def logits(x: Tensor, head: Head) -> Tensor:
    """Logits `[batch, vocab]` of the last of the positions of `x [batch, q, hidden]`."""
    result = product(normalise(x[:, -1:], head.norm), head.linear)[:, 0]
    return capped(result if head.divisor == 1 else result / head.divisor, head.softcap)


def normalise(x: Tensor, norm: Norm | None) -> Tensor:
    """`x [..., features]`; in float32 inside, as transformers does. Without a norm it is `x`."""
    if norm is None:
        return x
    if norm.centred and norm.weight.dim() == 1:
        return functional.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps)
    wide = x.float()
    if norm.centred:
        wide = wide - wide.mean(norm.over, keepdim=True)
    wide = wide * torch.rsqrt(wide.square().mean(norm.over, keepdim=True) + norm.eps)
    if norm.rounds_first:
        return norm.weight * wide.to(x.dtype)
    weight = norm.weight.float()
    return (wide * (weight + 1 if norm.plus_one else weight)).to(x.dtype)


def times(x: Tensor, factor: float) -> Tensor:
    """`x * factor`; nothing is computed for a factor of 1."""
    return x if factor == 1 else x * factor


def capped(x: Tensor, softcap: float | None) -> Tensor:
    """`softcap * tanh(x / softcap)`: within the cap either way; None: no bound."""
    return x if softcap is None else torch.tanh(x / softcap) * softcap


def attend_to_rows(q: Tensor, rows: Rows, seen: Tensor, scale: float, softcap: float | None = None) -> Tensor:
    """Attend with one query per head to a cache in chunks, without copying it or repeating grouped keys.

    Queries are stacked because a stack is a buffer of its own to inductor: else it would turn a query by its rotary
    position, and scale it, again for every eight keys.

    Args:
        q: `[batch, heads, 1, head_dim]`.
        rows: the chunks to attend to.
        seen: which positions count, `[chunks, CHUNK]`.
        scale: what the scores are multiplied by.
        softcap: what they are then bounded by.

    Returns:
        `[batch, heads, 1, head_dim]`
    """
    kv_heads = rows.keys.shape[1]
    queries = torch.stack((q.float() * scale)[:, :, 0].unflatten(1, (kv_heads, -1)).unbind(2), dim=2)
    scores = capped(rows.scores(queries), softcap)  # [batch, kv_heads, group, chunks, CHUNK]
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    weights = (scores - scores.amax((-2, -1), keepdim=True)).exp()
    attended = rows.weighted(weights) / weights.sum((-2, -1)).unsqueeze(-1)
    return attended.flatten(1, 2).unsqueeze(2).to(q.dtype)


def _rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn `x [batch, heads, q, head_dim]`. A roll, not a cat of halves: inductor fuses it with the loop beside it."""
    cos, sin = rotary
    rotated, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    turned = (rotated * cos + rotated.roll(cos.shape[-1] // 2, dims=-1) * sin).to(x.dtype)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned
