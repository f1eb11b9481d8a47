"""What fits in a memory: weights, a cache by arithmetic, and the workspace of a forward on tensors without memory."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from bench.case import HOST, Case
from bench.machine.kernels import Rates
from bench.measure.case_costs import (
    extended,
    forward_bytes,
    held,
    is_rehearsed,
    most_sequences,
    phase_costs_of,
    refusal,
)
from bench.measure.ceiling_turns import CEILINGS, survey
from bench.protocol import ChooseCeilings
from kvcache import models
from kvcache.arithmetic.kv_bytes import Fed
from kvcache.strategies.catalogue import LOSSY, REFEEDING

PROCESS_BYTES = 400_000_000
"""Resident memory of a worker before it holds anything: the interpreter, torch and transformers."""

HOLES_BYTES = 64_000_000
"""What glibc's heap may hold beyond what is asked of it: below 32 MiB it leaves holes, measured up to as much again."""

LATE_TOKENS = 127
"""A prompt fed at once is quantised at once; so many tokens after it may be held at full width (kv_bytes.py)."""

LONGEST = 1 << 24
"""Where neither memory nor positions end a context, it is given as this many tokens."""


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes that one process needs for one case; `workspace` is an estimate, the others are exact."""

    weights: int
    kv: int
    workspace: int

    @property
    def total(self) -> int:
        """Add all of them."""
        return self.weights + self.kv + self.workspace


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """The largest context of one kind of cache, or its largest batch at a given one; one row of `kvbench fit`."""

    model: str
    strategy: str
    dtype: str
    batch_size: int
    """The one asked for; with a context given, the largest that fits (0: not one does)."""
    memory_bytes: int
    max_context: int | None
    """Tokens of each sequence, prompt and new ones together: the most that fit (0: not one does), or those given. None
    where `error` says why."""
    limited_by: str | None
    """`memory`, `positions` (the model has no more), `sequences` (the strategy takes no more of this model), or
    `weights`, which alone do not fit."""
    weights_bytes: int
    kv_bytes_allocated: int | None = None
    workspace_bytes: int | None = None
    tokens_per_s: float | None = None
    """Of decode at that context, if it reached the machine's ceilings; None without them, or where its work is not
    known."""
    error: str | None = None


def need(model: models.ModelDescription, strategy: str, dtype: str, batch_size: int, n_tokens: int) -> Need | None:
    """Return what a prompt of `n_tokens` takes, fed in one forward; None for a kind that nothing is known of.

    The workspace is the process, what a forward makes and frees with the heap's holes, and the copy of a layer that
    grows.

    Raises:
        NotRehearsable: the strategy refuses this model.
    """
    kv = 0 if strategy in REFEEDING else _kv_bytes(model, strategy, dtype, batch_size, n_tokens)
    if kv is None:
        return None
    forward = forward_bytes(model, strategy, dtype, batch_size, n_tokens)
    workspace = PROCESS_BYTES + forward + min(forward, HOLES_BYTES) + kv // max(1, model.n_layers)
    return Need(weights=model.weights_bytes(dtype), kv=kv, workspace=workspace)


def fits(
    model: models.ModelDescription,
    strategies: Sequence[str],
    dtype: str,
    batch_sizes: Sequence[int],
    memory_bytes: int,
    rates: Rates | None,
    context: int | None = None,
) -> Iterator[Fit]:
    """Yield the largest context for each strategy and batch size, with its speed where `rates` are known.

    With a `context` it is the largest batch of so many tokens each, a row for each strategy.
    """
    from kvcache.proof.unknown_numbers import NotRehearsable

    weights_bytes = model.weights_bytes(dtype)
    for strategy in strategies:
        try:
            reason = refusal(model, strategy, dtype)
        except NotRehearsable as failed:
            reason = str(failed)
        for batch_size in batch_sizes if context is None else (1,):
            row = Fit(
                model=model.spec,
                strategy=strategy,
                dtype=dtype,
                batch_size=batch_size,
                memory_bytes=memory_bytes,
                max_context=None,
                limited_by=None,
                weights_bytes=weights_bytes,
                error=reason,
            )
            try:
                if reason:
                    yield row
                elif context is None:
                    yield _fitted(row, model, rates)
                else:
                    yield _batched(row, model, context, rates)
            except NotRehearsable as refused:
                yield msgspec.structs.replace(row, error=str(refused))


def _fitted(row: Fit, model: models.ModelDescription, rates: Rates | None) -> Fit:
    """Fill in the largest context of the row's batch size."""
    excess = functools.partial(_excess, row, model, row.batch_size)
    if need(model, row.strategy, row.dtype, row.batch_size, 1) is None:
        return msgspec.structs.replace(row, error=UNKNOWN)
    taken = most_sequences(model, row.strategy, row.dtype)
    if taken is not None and row.batch_size > taken:
        return msgspec.structs.replace(row, error=f"{row.strategy} takes at most {taken} sequences of this model")
    if excess(1) > 0:
        return msgspec.structs.replace(row, max_context=0, limited_by=_least(row))
    longest = model.max_positions or LONGEST
    context = _largest(excess, longest)
    limit = "memory" if context < longest else "positions" if model.max_positions else "nothing"
    return _filled(msgspec.structs.replace(row, max_context=context, limited_by=limit), model, rates)


def _batched(row: Fit, model: models.ModelDescription, context: int, rates: Rates | None) -> Fit:
    """Fill in the largest batch of sequences of `context` tokens."""

    def excess(batch_size: int) -> int:
        return _excess(row, model, batch_size, context)

    if need(model, row.strategy, row.dtype, 1, context) is None:
        return msgspec.structs.replace(row, error=UNKNOWN)
    row = msgspec.structs.replace(row, max_context=context, limited_by="memory")
    if excess(1) > 0:
        return msgspec.structs.replace(row, batch_size=0, limited_by=_least(row))
    taken = most_sequences(model, row.strategy, row.dtype)
    if taken is not None and excess(taken) <= 0:
        return _filled(msgspec.structs.replace(row, batch_size=taken, limited_by="sequences"), model, rates)
    kv = _kv_bytes(model, row.strategy, row.dtype, 1, context)
    # Twice, since one sequence's bytes include counters, which do not grow with the batch as the cache does.
    most = 2 * (row.memory_bytes - row.weights_bytes) // max(1, kv or 1)
    return _filled(msgspec.structs.replace(row, batch_size=_largest(excess, most)), model, rates)


UNKNOWN = "nothing is known of its bytes on this model"


def _excess(row: Fit, model: models.ModelDescription, batch_size: int, n_tokens: int) -> int:
    """Return by how many bytes it is too much, at least; not above 0: it fits."""
    kv = _kv_bytes(model, row.strategy, row.dtype, batch_size, n_tokens)
    assert kv is not None
    if row.weights_bytes + kv > row.memory_bytes:  # spares a forward of such a length
        return row.weights_bytes + kv - row.memory_bytes
    found = need(model, row.strategy, row.dtype, batch_size, n_tokens)
    assert found is not None
    return found.total - row.memory_bytes


def _least(row: Fit) -> str:
    """Say what is too much where not even the least fits."""
    return "weights" if row.weights_bytes > row.memory_bytes else "memory"


def _filled(row: Fit, model: models.ModelDescription, rates: Rates | None) -> Fit:
    """Add sizes and speed at the row's batch size and context."""
    from kvcache.proof.unknown_numbers import NotRehearsable

    assert row.max_context is not None
    found = need(model, row.strategy, row.dtype, row.batch_size, row.max_context)
    assert found is not None
    speed = None
    with suppress(NotRehearsable):  # its work may depend on numbers where its bytes do not
        speed = None if rates is None else _tokens_per_s(row, model, row.max_context, rates)
    return msgspec.structs.replace(
        row, kv_bytes_allocated=found.kv, workspace_bytes=found.workspace, tokens_per_s=speed
    )


def _largest(excess: Callable[[int], int], most: int) -> int:
    """Find the largest number up to `most` that fits, where 1 does and no number after one that does not.

    What is needed grows by nearly the same for each: looked for in turns where the line through both ends crosses 0,
    and in the middle.
    """
    low, high, below, above = 1, most, excess(1), excess(most)
    if above <= 0:
        return most
    on_line = True
    while high - low > 1:
        guess = low - below * (high - low) // (above - below) if on_line else (low + high) // 2
        guess, on_line = min(max(guess, low + 1), high - 1), not on_line
        size = excess(guess)
        if size <= 0:
            low, below = guess, size
        else:
            high, above = guess, size
    return low


def _tokens_per_s(row: Fit, model: models.ModelDescription, context: int, rates: Rates) -> float:
    """Predict the speed of decode at the end of a context: its products and its reads follow each other."""
    case = Case(
        model=row.model,
        strategy=row.strategy,
        device=HOST,
        dtype=row.dtype,
        attn_implementation=model.attn_implementation,
        n_threads=1,
        batch_size=row.batch_size,
        n_prompt=1,
        n_gen=2,
        n_depth=0,
        seed=0,
    )

    def seconds(n_tokens: int) -> float:
        step = phase_costs_of(msgspec.structs.replace(case, n_prompt=max(1, n_tokens - 1)), model, "decode")
        assert step is not None
        return step.flops / rates.flops_per_s + step.bytes / rates.bytes_per_s

    return row.batch_size / extended(seconds, context, model, row.dtype)


def _kv_bytes(model: models.ModelDescription, strategy: str, dtype: str, batch_size: int, n_tokens: int) -> int | None:
    """Return the most bytes that a cache takes while a context of so many tokens is fed at once, and after it."""

    def allocated(late: int, length: int) -> float:
        fed = Fed(
            batch_size=batch_size,
            n_depth=0,
            n_prompt=length - late,
            n_steps=late,
            capacity=length,
            dtype_bytes=models.DTYPES[dtype],
        )
        size = held(model, strategy, dtype, fed)
        return math.nan if size is None else size.allocated

    lates = {0, min(LATE_TOKENS, n_tokens - 1)} if strategy in LOSSY else {0}
    most = max(
        extended(functools.partial(allocated, late), n_tokens, model, dtype)
        if is_rehearsed(model, strategy)
        else allocated(late, n_tokens)
        for late in lates
    )
    return None if math.isnan(most) else math.ceil(most)


def rates_here(dtype: str, n_threads: int, say: Callable[[str], None]) -> Rates | None:
    """Measure this machine's GEMM rate and read bandwidth; None where they cannot be measured, and `say` says why."""
    from bench.measure.server_process import RunServers

    setting = ChooseCeilings(device=HOST, dtype=dtype, n_threads=n_threads)
    with RunServers() as servers:
        found = {each.ceiling: each.per_s for each in survey([setting], lambda count: servers.fork("", count), say)}
    if set(found) != set(CEILINGS):
        return None
    return Rates(flops_per_s=found["gemm"], bytes_per_s=found["read_bandwidth"])
