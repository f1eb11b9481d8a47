"""Pure arithmetic from a model's geometry: FLOPs, bytes moved, KV bytes, tokens processed. No torch, no clock.

GPT-2 with 124 million parameters. One token costs about two FLOPs per parameter (biases, norms and the position table
multiply nothing), and its keys and values take 72 KiB in float32:

>>> from types import SimpleNamespace
>>> from kvcache.arithmetic.architectures import geometry
>>> gpt2 = geometry(SimpleNamespace(model_type="gpt2", vocab_size=50257, hidden_size=768, num_hidden_layers=12,
...     num_attention_heads=12, n_inner=None, max_position_embeddings=1024, tie_word_embeddings=True))
>>> parameters(gpt2)
124439808
>>> token = forward_costs(gpt2, batch_size=1, n_query=1, n_cached=0)
>>> round(token.gemv_flops / parameters(gpt2), 2), token.kv_bytes // 1024
(1.99, 72)

63 decode steps after a prompt of 128: without a cache 160 times the tokens are processed, for 112 times the FLOPs (the
LM head sees the last position only). With one, every step reads all weights: one multiply-add per four bytes.

>>> decode = dict(batch_size=1, n_prompt=128, n_gen=64, n_depth=0, dtype_bytes=4)
>>> naive = phase_costs(gpt2, "decode", refeeds=True, **decode)
>>> cached = phase_costs(gpt2, "decode", refeeds=False, **decode)
>>> naive.tokens_processed // cached.tokens_processed, round(naive.flops / cached.flops)
(160, 112)
>>> round(naive.flops / naive.bytes), round(cached.flops / cached.bytes, 1)
(57, 0.5)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import reduce
from math import prod
from typing import Literal

from kvcache.arithmetic.geometry import Geometry, Layer, Matrix

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True, kw_only=True)
class Costs:
    """The work of one phase over the whole batch.

    One multiply-add is two FLOPs; only matrix products count. A product is a GEMM if it has more than one row
    (batch x positions; query positions for attention) and a GEMV if it has one. Attention counts the full rectangle
    of queries x keys that is multiplied, masked or not, as PaLM's MFU (arXiv:2204.02311, appendix B) and torch's FLOP
    counter do.
    """

    forward_calls: int
    tokens_processed: int
    gemm_flops: int
    gemv_flops: int
    bytes: int
    """Bytes that must cross the memory bus: weights once per forward, keys and values read and written, logits.

    A lower bound: activations, the copies of a growing cache, and keys a kernel reads twice are not in it.
    """
    kv_bytes: int
    """Bytes of keys and values held at the end of the phase that belong to tokens."""

    @property
    def flops(self) -> int:
        """All FLOPs of the phase."""
        return self.gemm_flops + self.gemv_flops

    def __add__(self, later: Costs) -> Costs:
        """Add up this work and then `later`: what is held at the end is what `later` holds."""
        return Costs(
            forward_calls=self.forward_calls + later.forward_calls,
            tokens_processed=self.tokens_processed + later.tokens_processed,
            gemm_flops=self.gemm_flops + later.gemm_flops,
            gemv_flops=self.gemv_flops + later.gemv_flops,
            bytes=self.bytes + later.bytes,
            kv_bytes=later.kv_bytes,
        )


def forward_costs(
    geometry: Geometry,
    *,
    batch_size: int,
    n_query: int,
    n_cached: int,
    logits_positions: int = 1,
    dtype_bytes: int = 4,
    reads_cache: bool = True,
    kv_stored: int | None = None,
) -> Costs:
    """Count the work of one forward of `n_query` tokens for each of `batch_size` sequences.

    Args:
        geometry, batch_size: the model, and how many sequences.
        n_query: tokens fed, per sequence.
        n_cached: tokens that the cache has seen before (a sliding window may have let some go).
        logits_positions: positions per sequence, counted from the last, that the LM head is computed for.
        dtype_bytes: of weights, keys, values and logits.
        reads_cache: False for a forward without a cache: nothing is read from one, and nothing kept.
        kv_stored: bytes of keys and values in the cache after the forward, for one that stores other numbers than those
            of `dtype_bytes`: what it held before is read, the rest written. None: all rows at `dtype_bytes`.

    Bytes: every weight once (of experts the most that can be touched, min(experts, tokens x experts per token): how
    far routing agrees is not known), a tied matrix as LM head, one row of the token and position tables per token, keys
    and values of the cache read, those of `n_query` written, logits written.
    """
    tokens, scored = batch_size * n_query, batch_size * logits_positions
    weights, active, attention, kv_moved, kv_held = geometry.vectors, 0, 0, 0, 0
    for layer in geometry.layers:
        keys = _held(layer, n_cached) + n_query if reads_cache else n_query
        held = _held(layer, n_cached + n_query) if reads_cache else 0
        experts = layer.experts
        if experts is not None:
            of_one = _size(experts.linears)
            weights += layer.count * min(experts.count, tokens * experts.per_token) * of_one
            active += layer.count * experts.per_token * of_one
        weights += layer.count * (_size(layer.linears) + layer.vectors)
        active += layer.count * _size(layer.linears)
        attention += layer.count * layer.heads * layer.head_dim * n_query * keys
        kv_moved += _kv_row(layer) * keys if reads_cache else 0  # keys - n_query are read, n_query are written
        kv_held += _kv_row(layer) * held
    weights += _size(geometry.linears)
    active += _size(geometry.linears)
    head = geometry.vocab_size * geometry.embedding_size
    looked_up = geometry.embedding_size + (geometry.hidden_size if geometry.position_rows else 0)
    products = (
        (tokens, 2 * tokens * active),
        (n_query, 2 * batch_size * 2 * attention),  # scores, and their product with the values
        (scored, 2 * scored * head),
    )
    numbers = weights + head + tokens * looked_up + scored * geometry.vocab_size
    return Costs(
        forward_calls=1,
        tokens_processed=tokens,
        gemm_flops=sum(flops for rows, flops in products if rows > 1),
        gemv_flops=sum(flops for rows, flops in products if rows == 1),
        bytes=dtype_bytes * numbers + (dtype_bytes * batch_size * kv_moved if kv_stored is None else kv_stored),
        kv_bytes=dtype_bytes * batch_size * kv_held if kv_stored is None else kv_stored,
    )


def phase_costs(
    geometry: Geometry,
    phase: Phase,
    *,
    refeeds: bool,
    batch_size: int,
    n_prompt: int,
    n_gen: int,
    n_depth: int,
    dtype_bytes: int,
    all_logits: bool = False,
    kv_stored: Callable[[int], int] | None = None,
) -> Costs | None:
    """Add up a whole phase: the prefill's one forward, or the n_gen - 1 decode steps (None if there are none).

    Args:
        refeeds: True for naive: every forward feeds context, prompt and what was emitted so far; there is no cache.
        n_prompt, n_gen, n_depth: tokens of the prompt, tokens emitted, tokens of the context before the prompt.
        all_logits: the LM head is computed for every position fed.
        geometry, batch_size, dtype_bytes: as in `forward_costs`.
        kv_stored: that of `forward_costs`, by the number of decode steps taken.
    """

    def forward(n_before: int, n_new: int, n_steps: int = 0) -> Costs:
        n_query, n_cached = (n_before + n_new, 0) if refeeds else (n_new, n_before)
        return forward_costs(
            geometry,
            batch_size=batch_size,
            n_query=n_query,
            n_cached=n_cached,
            logits_positions=n_query if all_logits else 1,
            dtype_bytes=dtype_bytes,
            reads_cache=not refeeds,
            kv_stored=None if kv_stored is None else kv_stored(n_steps),
        )

    if phase == "prefill":
        return forward(n_depth, n_prompt)
    n_prefilled = n_depth + n_prompt
    steps = (forward(n_prefilled + step - 1, 1, step) for step in range(1, n_gen))
    first = next(steps, None)
    return None if first is None else reduce(Costs.__add__, steps, first)


def interpolated(costs: Callable[[int], Costs], first: int, last: int) -> Costs | None:
    """Add up the `costs` of the steps from `first` to `last`, where each is dear to find; None if there are none.

    A long stretch is read off the parabola through three of its steps if two more lie on it within a thousandth: the
    work of a step is a polynomial of its number, but for the lengths at which windows fill and chunks begin.
    """
    if last - first < 6:
        steps = [costs(step) for step in range(first, last + 1)]
        return reduce(Costs.__add__, steps) if steps else None
    middle = (first + last) // 2
    curve = _parabola({step: costs(step) for step in (first, middle, last)})
    if all(_is_close(curve(step), costs(step)) for step in ((first + middle) // 2, (middle + last) // 2)):
        return reduce(Costs.__add__, map(curve, range(first, last + 1)))
    halves = interpolated(costs, first, middle), interpolated(costs, middle + 1, last)
    return reduce(Costs.__add__, filter(None, halves))


def _parabola(points: dict[int, Costs]) -> Callable[[int], Costs]:
    """Return the curve through three points, in Lagrange's form; fractions, so that it is exact."""

    def at(step: int) -> Costs:
        weights = {
            here: prod(Fraction(step - other, here - other) for other in points if other != here) for here in points
        }
        return Costs(
            **{
                field.name: round(sum(weights[here] * getattr(costs, field.name) for here, costs in points.items()))
                for field in fields(Costs)
            }
        )

    return at


def _is_close(one: Costs, other: Costs) -> bool:
    pairs = ((getattr(one, field.name), getattr(other, field.name)) for field in fields(Costs))
    return all(abs(a - b) * 1000 <= max(a, b) for a, b in pairs)


def parameters(geometry: Geometry) -> int:
    """Count the numbers in the weights, a tied matrix once."""
    total = geometry.vectors + _size(geometry.linears) + geometry.position_rows * geometry.hidden_size
    total += geometry.vocab_size * geometry.embedding_size * (1 if geometry.tied else 2)
    for layer in geometry.layers:
        experts = 0 if layer.experts is None else layer.experts.count * _size(layer.experts.linears)
        total += layer.count * (_size(layer.linears) + layer.vectors + experts)
    return total


def _held(layer: Layer, n_seen: int) -> int:
    """Count the rows of `n_seen` tokens that are held: one less than its window of a layer that slides."""
    return n_seen if layer.window is None else min(n_seen, layer.window - 1)


def _kv_row(layer: Layer) -> int:
    """Count the numbers in the keys and values of one token in all of these layers."""
    return layer.count * 2 * layer.kv_heads * layer.head_dim


def _size(linears: Iterable[Matrix]) -> int:
    return sum(n_in * n_out for n_in, n_out in linears)
