"""From sweeps to a plan: every case checked against its model, with its costs, and its memory estimated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from bench.case import Case, Group, Sweep, UsageError
from bench.record import CasePlan
from kvcache import models
from kvcache.catalogue import STRATEGIES
from kvcache.costs import phase_costs
from kvcache.architectures import UnknownGeometry, geometry

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PROCESS_BYTES = 400_000_000
"""Resident memory of a worker before it holds anything: the interpreter, torch and transformers."""


def plan(sweeps: Sequence[Sweep]) -> list[CasePlan]:
    """Every case of `sweeps` with its costs, checked against the models' configurations (no weights are loaded).

    Raises:
        UsageError: two cells are equal, a model cannot be had, or a case does not fit its model.
    """
    cases = [case for sweep in sweeps for case in sweep.cases()]
    doubled = [case for case, count in Counter(cases).items() if count > 1]
    if doubled:
        raise UsageError(f"the grid names a cell twice: {doubled[0].key}; give every value of a list once")
    described = {model: describe(model) for model in dict.fromkeys(case.model for case in cases)}
    for case in cases:
        _fits(case, described[case.model])
    return [_with_costs(case, described[case.model]) for case in cases]


def describe(model: str) -> models.ModelDescription:
    """As `models.describe`, a model that cannot be had being a usage error."""
    try:
        return models.describe(model)
    except models.ModelError as error:
        raise UsageError(f"--model {model}: {error}") from error


def memory_bytes(plans: Iterable[CasePlan], weights_bytes: dict[str, int]) -> int:
    """The most memory that any group of `plans` needs at once, all its workers together (an upper estimate).

    `weights_bytes` gives each model's size in float32. Weights are mapped from one file and shared by the workers of
    a group; keys, values and the reference's logits are each worker's own.
    """
    needs: dict[Group, int] = {}
    for group in dict.fromkeys(item.case.group for item in plans):
        members = [item for item in plans if item.case.group == group]
        arms = {item.case.strategy for item in members}
        weights = weights_bytes[group.model] * DTYPE_BYTES[group.dtype] // 4
        largest = max(_case_bytes(item) for item in members)
        needs[group] = weights + (len(arms) + 1) * (PROCESS_BYTES + largest)
    return max(needs.values(), default=0)


def _case_bytes(item: CasePlan) -> int:
    case, dtype_bytes = item.case, DTYPE_BYTES[item.case.dtype]
    last = item.decode or item.prefill
    kv = last.kv_bytes if last is not None else 0
    vocab = 50_000 if item.prefill is None else item.prefill.logits_bytes // (case.batch_size * dtype_bytes)
    reference = 2 * case.batch_size * case.n_gen * vocab * dtype_bytes
    return 3 * kv + reference


def _fits(case: Case, model: models.ModelDescription) -> None:
    if case.strategy not in STRATEGIES:
        raise UsageError(f"--strategies {case.strategy}: no such strategy")
    if model.max_positions is not None and case.capacity > model.max_positions:
        raise UsageError(
            f"n_depth {case.n_depth} + n_prompt {case.n_prompt} + n_gen {case.n_gen} = {case.capacity} tokens are more "
            f"than the {model.max_positions} positions of {case.model}"
        )


def _with_costs(case: Case, model: models.ModelDescription) -> CasePlan:
    try:
        shape = geometry(model.config)
    except UnknownGeometry:
        return CasePlan(case=case, prefill=None, decode=None)
    prefill, decode = (
        phase_costs(
            shape,
            phase,
            refeeds=case.strategy == "naive",
            batch_size=case.batch_size,
            n_prompt=case.n_prompt,
            n_gen=case.n_gen,
            n_depth=case.n_depth,
            dtype_bytes=DTYPE_BYTES[case.dtype],
            all_logits=case.naive_logits == "all",
        )
        for phase in ("prefill", "decode")
    )
    return CasePlan(case=case, prefill=prefill, decode=decode)
