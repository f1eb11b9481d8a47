"""A case with its costs and bytes: by formula where the architecture has one, else rehearsed without weights."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from bench.case import Case
from bench.manifest import CasePlan
from kvcache import models
from kvcache.arithmetic.architectures import UnknownGeometry, geometry
from kvcache.arithmetic.costs import Costs, Phase, interpolated, parameters, phase_costs
from kvcache.arithmetic.geometry import Geometry, Matrix
from kvcache.arithmetic.kv_bytes import Fed, Held
from kvcache.strategies.catalogue import EVICTING, LOSSY, PLAIN_CACHE, REFEEDING, STRATEGIES

if TYPE_CHECKING:
    from kvcache.proof.rehearsal import Rehearsal
    from kvcache.proof.workspace import Workspace


def with_costs(case: Case, model: models.ModelDescription) -> CasePlan:
    """Add the work that generation asks for, however it is done: a static cache's padding is no part of it."""
    from kvcache.proof.unknown_numbers import NotRehearsable

    weights_bytes, linears = model.weights_bytes(case.dtype), _linears(model, case.dtype)
    planned = CasePlan(case=case, prefill=None, decode=None, weights_bytes=weights_bytes, linears=linears)
    ends: dict[Phase, int] = {"prefill": 0, "decode": case.n_gen - 1} if case.n_gen > 1 else {"prefill": 0}
    try:
        every = {phase: held(model, case.strategy, case.dtype, fed(case, steps)) for phase, steps in ends.items()}
        sizes = {phase: size for phase, size in every.items() if size is not None}
        planned = msgspec.structs.replace(
            planned,
            kv_bytes={phase: size.used for phase, size in sizes.items()} or None,
            kv_bytes_allocated={phase: size.allocated for phase, size in sizes.items()} or None,
        )
        costs = {phase: phase_costs_of(case, model, phase) for phase in ends}
    except NotRehearsable as reason:
        return msgspec.structs.replace(planned, unpredicted=str(reason))
    for phase, size in sizes.items():
        found = costs[phase]
        if found is not None:
            costs[phase] = replace(found, kv_bytes=size.used)
    return msgspec.structs.replace(planned, prefill=costs["prefill"], decode=costs.get("decode"))


def fed(case: Case, n_steps: int) -> Fed:
    """Say what a case feeds a cache up to its decode step `n_steps`."""
    lengths = {name: getattr(case, name) for name in ("batch_size", "n_prompt", "n_depth", "capacity")}
    return Fed(**lengths, n_steps=n_steps, dtype_bytes=models.DTYPES[case.dtype])


def held(model: models.ModelDescription, strategy: str, dtype: str, after: Fed) -> Held | None:
    """Predict what a strategy's cache holds `after` it was fed; None for a kind that nothing is known of.

    Raises:
        NotRehearsable: the strategy refuses this model, or no shape of it is known without its weights.
    """
    if strategy in REFEEDING:
        return Held(used=0, allocated=0)
    shape, entry = _shape(model), STRATEGIES.get(strategy)
    if entry is None:  # the user's own
        return None
    if shape is not None:
        return entry.formula.held(shape.layers, after)
    if entry.rehearsed_by:
        rehearsal = _rehearsal(model, dtype)
        if entry.yardstick and rehearsal.refusal(entry.rehearsed_by) is not None:  # the model brings its own cache
            return rehearsal.generated(strategy, after)
        if entry.yardstick:
            rehearsal.check_generate(after)
        return rehearsal.held(entry.rehearsed_by, after)
    if entry.compiles:
        return entry.formula.held(_rehearsal(model, dtype).compiled_layers(strategy), after)
    layers = _rehearsal(model, dtype).full_rows
    if layers is None:
        return None
    both = entry.formula.held(layers, after)  # keys and values apart: the formulas count each entry for both
    return Held(used=both.used // 2, allocated=both.allocated // 2)


def forward_bytes(model: models.ModelDescription, strategy: str, dtype: str, batch_size: int, n_tokens: int) -> int:
    """Return the most memory that a forward of `n_tokens` takes on the CPU beyond weights and cache, from above.

    It is counted for one token and for a round number of at least `n_tokens`, and read off the line between them. What
    a token needs never falls with the length and grows at most with it (masks, scores): too much by a quarter at most.

    Raises:
        NotRehearsable: the strategy refuses this model, or its forward asks for numbers.
    """
    counted = _workspace_of(model.spec, "eager" if model.attn_implementation == "eager" else "sdpa", dtype)
    kind = None if strategy in REFEEDING else PLAIN_CACHE  # a prompt passes through the layers alike for every kind
    step = 1 << max(0, n_tokens.bit_length() - 3)
    longest = max(2, n_tokens, min(-(-n_tokens // step) * step, model.max_positions or sys.maxsize))
    one, most = (counted.forward_bytes(kind, batch_size, length) for length in (1, longest))
    return one + math.ceil((most - one) * (n_tokens - 1) / (longest - 1))


def exact_kv_bytes(case: Case, model: models.ModelDescription) -> int:
    """Return the bytes of a case's keys, values and states at full width; 0 where no cache of transformers has any."""
    from kvcache.proof.unknown_numbers import NotRehearsable

    try:
        size = held(model, PLAIN_CACHE, case.dtype, fed(case, case.n_gen - 1))
    except NotRehearsable:
        return 0
    return 0 if size is None else size.used


def refusal(model: models.ModelDescription, strategy: str, dtype: str) -> str | None:
    """Return why a strategy cannot run this model here, or None if it can."""
    return _rehearsal(model, dtype).refusal(strategy)


def most_sequences(model: models.ModelDescription, strategy: str, dtype: str) -> int | None:
    """Return the largest batch that a strategy takes of this model, or None for any."""
    return _rehearsal(model, dtype).most_sequences(strategy)


def is_rehearsed(model: models.ModelDescription, strategy: str) -> bool:
    """Return whether a strategy's bytes are those of a rehearsal, not of a formula (of whole chunks, for one)."""
    entry = STRATEGIES.get(strategy)
    return entry is not None and entry.rehearsed_by != "" and _shape(model) is None


def extended(count: Callable[[int], float], n_tokens: int, model: models.ModelDescription, dtype: str) -> float:
    """Return `count(n_tokens)`; where that is a long rehearsal, read off the line that it follows past all windows."""
    far = math.inf if _shape(model) is not None else _rehearsal(model, dtype).full_windows
    if n_tokens <= far:
        return count(n_tokens)
    half = int(far) // 2
    return count(2 * half) + (count(2 * half) - count(half)) * (n_tokens - 2 * half) / half


def phase_costs_of(case: Case, model: models.ModelDescription, phase: Phase) -> Costs | None:
    """Count the work of a phase of a case; None where it has none.

    Raises:
        NotRehearsable: the strategy refuses this model, or no shape of it is known without its weights.
    """
    from kvcache.proof.unknown_numbers import NotRehearsable

    refeeds, all_logits = case.strategy in REFEEDING, case.naive_logits == "all"

    def stored(n_steps: int) -> int:
        """Predict the bytes of a lossy kind that belong to tokens after so many steps of decode."""
        size = held(model, case.strategy, case.dtype, fed(case, n_steps))
        if size is None:
            raise NotRehearsable(f"nothing is known of the bytes of {case.strategy} on this model")
        return size.used

    shape = _shape(model)
    if shape is not None:
        return phase_costs(
            shape if case.strategy not in EVICTING else STRATEGIES[case.strategy].formula.attended(shape),
            phase,
            refeeds=refeeds,
            **{name: getattr(case, name) for name in ("batch_size", "n_prompt", "n_depth", "n_gen")},
            dtype_bytes=models.DTYPES[case.dtype],
            all_logits=all_logits,
            kv_stored=stored if case.strategy in LOSSY else None,
        )
    rehearsal = _rehearsal(model, case.dtype)

    def forward(n_before: int, n_new: int, n_steps: int) -> Costs:
        return rehearsal.forward_costs(
            batch_size=case.batch_size,
            n_query=n_before + n_new if refeeds else n_new,
            n_cached=0 if refeeds else n_before,
            reads_cache=not refeeds,
            all_logits=refeeds and all_logits,
            kv_stored=stored(n_steps) if case.strategy in LOSSY else None,
            strategy=case.strategy if case.strategy in EVICTING else PLAIN_CACHE,
        )

    if phase == "prefill":
        return forward(case.n_depth, case.n_prompt, 0)
    prefilled = case.n_depth + case.n_prompt
    return interpolated(lambda step: forward(prefilled + step - 1, 1, step), 1, case.n_gen - 1)


def _shape(model: models.ModelDescription) -> Geometry | None:
    """Return the sizes that the formulas know; None where they are not those of the model."""
    try:
        shape = geometry(model.config)
    except UnknownGeometry:
        return None
    return shape if parameters(shape) == model.n_parameters else None


def _linears(model: models.ModelDescription, dtype: str) -> tuple[Matrix, ...]:
    """List the shapes of the model's linear layers, each once, the smallest first."""
    shape = _shape(model)
    found = _rehearsal(model, dtype).linears if shape is None else shape.every_linear
    return tuple(sorted(set(found), key=lambda linear: (math.prod(linear), linear)))


@functools.cache
def _rehearsal_of(spec: str, attn_implementation: str, dtype: str) -> Rehearsal:
    import torch

    from kvcache.proof.rehearsal import Rehearsal

    return Rehearsal(models.without_weights(spec, attn_implementation, dtype), getattr(torch, dtype))


@functools.cache
def _workspace_of(spec: str, attn_implementation: str, dtype: str) -> Workspace:
    import torch

    from kvcache.proof.workspace import Workspace

    return Workspace(models.without_weights(spec, attn_implementation, dtype), getattr(torch, dtype))


def _rehearsal(model: models.ModelDescription, dtype: str) -> Rehearsal:
    return _rehearsal_of(model.spec, model.attn_implementation, dtype)
