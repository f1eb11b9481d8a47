"""The arithmetic of `compiled`: plain functions of tensors, run eagerly over a prompt and compiled for a step.

Axes: `batch` sequences, `q` positions of one forward, `in` and `out` features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:  # a ceiling takes oneDNN's product from here and needs no transformers
    from kvcache.compiled.decoder import Head, Layer, Norm, Rotary
from kvcache.compiled.rows import Rows

FEW_ROWS = 8
"""Up to here a compiled product is a multiply-and-sum, above it a GEMM."""

STREAMS = 2
"""Places at which a product reads its weight at once; more than one keeps more of the memory's channels busy (5 %)."""

Activation = Callable[[Tensor], Tensor]
"""It may write its result over its argument."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`q [batch, heads, q, head_dim]`, `k` and `v [batch, kv_heads, q, head_dim]` -> `[batch, heads, q, head_dim]`."""


class Linear(NamedTuple):
    """`weight [out, in]`, `bias [out]` or None."""

    weight: Tensor
    bias: Tensor | None = None


def block(x: Tensor, layer: Layer, rotaries: tuple[Rotary, ...], attend: Attend, activation: Activation) -> Tensor:
    """One layer over `x [batch, q, hidden]`; `rotaries` are the model's tables at its q positions."""
    h = normalise(x, layer.attention_norm)
    q, k, v = layer.split(tuple(product(h, part) for part in layer.qkv), layer.head_dim)
    q, k = normalise(q, layer.q_norm), normalise(k, layer.k_norm)
    if layer.rotary is not None:
        q, k = (_rotate(part, rotaries[layer.rotary]) for part in (q, k))
    attended = product(attend(q, k, v).transpose(1, 2).flatten(2), layer.o)
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


def product(x: Tensor, linear: Linear) -> Tensor:
    """`x [batch, q, in]` times a linear's weight: `[batch, q, out]`.

    Few rows are bound by reading the weight, and inductor turns this multiply-and-sum, one reduction per row over the
    same loop, into one pass over it at the speed of memory (`F.linear`: a quarter of that). For many rows oneDNN on
    the plain weight has 0.9 of its speed on a packed one, and 1.2 to 1.8 times that of `F.linear` in float32, so no
    second layout is kept.
    """
    if x.device.type != "cpu" or (torch.compiler.is_compiling() and not is_few_rows(x)):
        return functional.linear(x, *linear)  # inductor takes oneDNN's for constant weights only
    if not torch.compiler.is_compiling():
        return _product_of_many(x, *linear)
    rows = x.shape[0] * x.shape[1]
    out_features = linear.weight.shape[0]
    streams = STREAMS if out_features % STREAMS == 0 else 1
    parts = linear.weight.float().unflatten(0, (streams, -1)).unbind(0)
    sums = torch.stack([(part * row).sum(-1) for row in x.flatten(0, 1).float().unbind(0) for part in parts])
    sums = sums.view(rows, out_features)
    if linear.bias is not None:
        sums = sums + linear.bias
    return sums.to(x.dtype).view(*x.shape[:2], -1)


def is_few_rows(x: Tensor) -> bool:
    """Return whether `x [batch, q, in]` has few enough positions to multiply and sum."""
    return x.shape[0] * x.shape[1] <= FEW_ROWS


def product_by_feature(rows: Tensor, linear: Linear) -> Tensor:
    """`rows [rows, in]` times a linear's weight, a row for each feature: `[out, rows]`.

    oneDNN lays its second factor out anew at every call. With the weight as the first factor that is the prompt's few
    rows and not the weight: 200 against 186 GFLOP/s at 128 rows (packed weights: 206), float32; 380 against 353 in
    bfloat16. What stands between two such products (a gate) does not care which axis comes first.
    """
    result = _product_of_many(linear.weight, rows)
    return result if linear.bias is None else result.add_(linear.bias.unsqueeze(1))


def _product_of_many(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`; in float32 where oneDNN has no product of bfloat16 (an x86 CPU without AVX-512)."""
    if x.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():  # noqa: SLF001  # no public name
        wide = onednn_linear(x.float(), weight.float(), None if bias is None else bias.float())
        return wide.to(x.dtype)
    return onednn_linear(x, weight, bias)


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` by oneDNN, on a weight that is not packed."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # noqa: SLF001  # no public name
    return result


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
