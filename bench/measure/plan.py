"""From sweeps to a plan: every case checked against its model, with its costs, and its memory estimated."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import msgspec

from bench.case import Case, Sweep
from bench.errors import UsageError, blaming
from bench.machine.devices import DEVICES
from bench.manifest import CasePlan, Manifest
from bench.measure.case_costs import exact_kv_bytes, with_costs
from bench.measure.fit import PROCESS_BYTES, need
from bench.naming import Name
from kvcache import models
from kvcache.models.checkpoint import COPY_LIMIT_BYTES
from kvcache.strategies.catalogue import COMPILING, OWN, is_lossy

COMPILER_BYTES = 32_000_000
"""Room for what inductor and the C++ compiler write; a compiler that finds none says no more than that it failed."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much is measured: turns per case and process, processes per strategy, and the seconds a case may take.

    With `ceilings` the machine's roofs have turns in every round too, and again after each second of the cases' turns.
    """

    repetitions: int = 6
    processes: int = 1
    timeout_s: float = 900.0
    ceilings: bool = False
    budget_min: float | None = None
    """Minutes that the run may take; the plan is reduced to fit. None: measured whole."""

    @classmethod
    def of(cls, run: Manifest) -> Limits:
        """Return how much a run measures; one that began without ceilings goes on without them."""
        return cls(
            repetitions=run.repetitions,
            processes=run.processes,
            timeout_s=run.timeout_s,
            budget_min=run.budget_min,
            ceilings=bool(run.ceilings),
        )


def within_positions(sweeps: Sequence[Sweep], say: Callable[[str], None]) -> tuple[Sweep, ...]:
    """Return a preset's sweeps without the prompts that a model has no positions for; `say` gets a line for each.

    A sweep that none of its prompts fits is left as it is, for the plan to refuse with the reason.
    """
    fitting = []
    for sweep in sweeps:
        limits = {model: describe(model, sweep.attn_implementation).max_positions for model in sweep.models}
        model, limit = min(limits.items(), key=lambda item: math.inf if item[1] is None else item[1])
        room = math.inf if limit is None else limit - max(sweep.n_gen) - max(sweep.n_depth)
        kept = tuple(n_prompt for n_prompt in sweep.n_prompt if n_prompt <= room)
        left_out = ", ".join(str(n_prompt) for n_prompt in sweep.n_prompt if n_prompt > room)
        if kept and left_out:
            say(f"kvbench: {model} has {limit} positions: the preset's prompts of {left_out} are left out")
        fitting.append(msgspec.structs.replace(sweep, n_prompt=kept or sweep.n_prompt))
    return tuple(fitting)


def plan(sweeps: Sequence[Sweep]) -> list[CasePlan]:
    """Return every case of `sweeps` with its costs, checked against the models' configurations (no weights are loaded).

    A case that several sweeps name is measured once.

    Raises:
        UsageError: a model or a user's own cache is not available, or a case does not fit its model.
    """
    planned = {}
    refuse_missing_factories(strategy for sweep in sweeps for strategy in sweep.strategies)
    for case in (case for sweep in sweeps for case in sweep.cases()):
        model = describe(case.model, case.attn_implementation)
        settled = msgspec.structs.replace(case, attn_implementation=model.attn_implementation)
        refuse_too_long(settled, model.max_positions)
        planned[settled] = with_costs(settled, model)
    return list(planned.values())


@functools.cache
def describe(model: str, attn_implementation: str) -> models.ModelDescription:
    """Describe a model (no attention: its best); raises UsageError where it is not available."""
    try:
        return models.describe(model, attn_implementation=attn_implementation or None)
    except models.ModelError as error:
        raise UsageError(blaming("--model", model, error)) from error


def refuse_missing_factories(strategies: Iterable[str]) -> None:
    """Raise UsageError if the factory of a user's own cache cannot be imported: one that raises fails its cases."""
    from kvcache.models.own_code import load_own  # imports torch, as describing the models does

    for strategy in dict.fromkeys(strategies):
        if strategy.startswith(OWN):
            _, module, name = strategy.split(":")
            try:
                load_own(module, name, strategy)
            except models.ModelError as error:
                raise UsageError(blaming("--strategies", strategy, error)) from error


def memory_bytes(plans: Sequence[CasePlan]) -> int:
    """Return the most memory that any group of `plans` needs at once, all its workers together (an upper estimate).

    Weights are mapped from one file and shared by the workers of a group, unless they are very large or the user's
    own code makes them; keys, values and logits are each worker's own.
    """
    needs = []
    for group in dict.fromkeys(item.case.group for item in plans):
        members = [item for item in plans if item.case.group == group]
        weights = describe(group.model, group.attn_implementation).weights_bytes(group.dtype)
        workers = 1 + len({item.case.strategy for item in members})
        shared = weights <= COPY_LIMIT_BYTES and not group.model.startswith("py:")
        of_cases = workers * (PROCESS_BYTES + max(map(_case_bytes, members)))
        needs.append(weights * (1 if shared else workers) + of_cases + 2 * PROCESS_BYTES)  # 2: the ceilings' worker
    return max(needs, default=0)


def in_words(item: CasePlan, name: Name, *, here: bool = True) -> str:
    """Name a case with what it holds, by the arithmetic of `kvbench fit`.

    Where it is measured `here`, say also if it alone does not fit.
    """
    from kvcache.proof.unknown_numbers import NotRehearsable  # imports torch, which the model's description did already

    case = item.case
    try:
        found = need(
            describe(case.model, case.attn_implementation), case.strategy, case.dtype, case.batch_size, case.capacity
        )
    except NotRehearsable as reason:
        return f"{name(case)}: {reason}"
    if found is None:
        return name(case)
    parts = {"weights": found.weights, "cache": found.kv, "workspace": found.workspace}
    sizes = f"{name(case)}: " + " + ".join(f"{name} {size / 1e9:.3g} GB" for name, size in parts.items())
    free = DEVICES[case.device].available_memory_bytes() if here else None
    return (
        sizes if free is None or found.total <= free else f"{sizes}: DOES NOT FIT the {free / 1e9:.3g} GB that are free"
    )


def temporary_bytes(plans: Sequence[CasePlan]) -> int:
    """Return the size of what a run keeps in temporary files at a time: the logits of a cell, and a compiler's work."""
    logits = []
    for case in (item.case for item in plans):
        model = describe(case.model, case.attn_implementation)
        positions = case.n_gen + _judged_positions(case, model)
        logits.append(case.batch_size * positions * model.vocab_size * models.DTYPES[case.dtype])
    compiles = any(item.case.strategy in COMPILING for item in plans) and "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    return max(logits, default=0) + (COMPILER_BYTES if compiles else 0)


def _case_bytes(item: CasePlan) -> int:
    """Sum keys and values (held twice while a cache grows), logits (the expected ones beside a strategy's), token ids.

    A lossy strategy has the logits of the text that judges it, too.
    """
    case = item.case
    model = describe(case.model, case.attn_implementation)
    # The reference keeps a cache and naive does not, so the cache of a case counts whatever its strategy.
    # It is of full width, and judging needs one beside a lossy strategy's.
    kept = case.n_gen + (case.n_depth + case.n_prompt if case.naive_logits == "all" else 0)
    positions = 2 * kept + _judged_positions(case, model)
    logits = case.batch_size * positions * model.vocab_size * models.DTYPES[case.dtype]
    ids = 8 * case.batch_size * case.capacity
    return 3 * exact_kv_bytes(case, model) + logits + ids


def _judged_positions(case: Case, model: models.ModelDescription) -> int:
    """Count the positions of each sequence by whose exact logits the case is judged; 0 unless it is lossy."""
    if not is_lossy(case.strategy):
        return 0
    from kvcache.proof.judging import kept_positions  # imports torch, which the model's description did already

    return kept_positions(case.n_depth + case.n_prompt, model.max_positions)


def refuse_too_long(case: Case, max_positions: int | None) -> None:
    """Raise UsageError if the case is longer than what its model can take."""
    if max_positions is not None and case.capacity > max_positions:
        raise UsageError(
            f"n_depth {case.n_depth} + n_prompt {case.n_prompt} + n_gen {case.n_gen} = {case.capacity} tokens are more "
            f"than the {max_positions} positions of {case.model}; make --n-prompt, --n-depth or --n-gen smaller"
        )
