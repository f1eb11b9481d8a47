"""Run -> tidy frames: a row per turn and phase, a row per timed decode step. Nothing is dropped, warm-ups flagged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import pandas as pd

from bench.case import Case
from bench.record import Covariates, Run

CASE_COLUMNS: list[str] = list(Case.__struct_fields__)
"""The fields of a case; every frame of its turns has them after the `case` key."""

COVARIATE_COLUMNS: list[str] = list(Covariates.__struct_fields__)

_TURN: list[str] = ["process", "round", "order", "warmup"]
"""Which turn it was; the fields of a `Sample` and of a `CeilingSample` that say so."""

_COVARIATES = ["wall_ms", *COVARIATE_COLUMNS]

_TIMES = ["latency_ms", "total_ms", "steps_timed"]

TURN_COLUMNS: list[str] = ["case", *CASE_COLUMNS, "phase", *_TURN, *_TIMES, *_COVARIATES]
STEP_COLUMNS: list[str] = ["case", *CASE_COLUMNS, *_TURN, "step", "position", "latency_ms", "first"]
CEILING_COLUMNS: list[str] = ["cell", "ceiling", "kernel", "n_threads", *_TURN, "per_s", "cache_bytes", *_COVARIATES]

NS_PER_MS = 1e6

_TYPES: dict[str, str] = {
    **{field.name: "int64" for field in msgspec.structs.fields(Case) if field.type is int},
    **dict.fromkeys(_TURN, "int64"),
    **dict.fromkeys(["warmup", "first", "prefill_quantized"], "bool"),
    **dict.fromkeys(["latency_ms", "total_ms", "wall_ms", "per_s"], "float64"),
    **dict.fromkeys(["step", "position", "steps_timed", "cache_bytes", *COVARIATE_COLUMNS], "Int64"),
}
"""The type of every column that is not text."""


def turns(run: Run) -> pd.DataFrame:
    """Make one row per case, phase and turn.

    `latency_ms` is TTFT for prefill and TPOT for decode (`total_ms / (n_gen - 1)`). `total_ms` is the whole phase, with
    the untimed steps of a naive decode interpolated linearly between the timed ones (`bench.case.naive_steps`; beyond
    the outermost of them stands the nearest). `steps_timed` counts the timed decode steps (empty for prefill).
    `wall_ms` is all host time measured in the turn, over both phases: what the covariates, differences over the whole
    turn, relate to. CUDA event times stand for host times where they are stored.
    A case with n_gen = 1 has no decode rows.

    Raises:
        ValueError: no decode step of a turn was timed.
    """
    cases = _cases(run)
    rows: list[dict[str, Any]] = []
    for sample in run.samples:
        case, (prefill_ns, step_ns) = cases[sample.case], sample.device_ns
        shared = msgspec.structs.asdict(sample) | msgspec.structs.asdict(sample.covariates)
        shared["wall_ms"] = sample.total_ns / NS_PER_MS
        ttft_ms = prefill_ns / NS_PER_MS
        rows.append({**shared, "phase": "prefill", "latency_ms": ttft_ms, "total_ms": ttft_ms})
        if case.n_gen > 1:
            if not sample.steps:
                raise ValueError(f"no decode step of {sample.case} was timed in round {sample.round}")
            total_ms = np.interp(np.arange(1, case.n_gen), sample.steps, step_ns).sum() / NS_PER_MS
            times = {"latency_ms": total_ms / (case.n_gen - 1), "total_ms": total_ms, "steps_timed": len(step_ns)}
            rows.append({**shared, "phase": "decode", **times})
    return _with_cases(run, rows, TURN_COLUMNS)


def steps(run: Run) -> pd.DataFrame:
    """Make one row per timed decode step.

    `position` is the length of the sequence that the step continues, `n_depth + n_prompt + step`: what naive
    generation feeds in this step, and what the cached step attends to. `first` flags the first step after a prefill.
    """
    rows = [
        {**msgspec.structs.asdict(sample), "step": step, "latency_ms": ns / NS_PER_MS, "first": step == 1}
        for sample in run.samples
        for step, ns in zip(sample.steps, sample.device_ns[1], strict=True)
    ]
    frame = _with_cases(run, rows, STEP_COLUMNS)
    return frame.assign(position=frame["n_depth"] + frame["n_prompt"] + frame["step"])


def ceilings(run: Run) -> pd.DataFrame:
    """Make one row per turn of a ceiling: `per_s` is its rate by the median pass, in bytes or FLOP per second."""
    threads = {plan.case.cell.key: plan.case.n_threads for plan in run.manifest.plan}
    rows = [
        {
            **msgspec.structs.asdict(taken),
            "n_threads": threads[taken.cell],
            "per_s": taken.amount / float(np.median(taken.pass_ns)) * 1e9,
            "wall_ms": sum(taken.pass_ns) / NS_PER_MS,
            **msgspec.structs.asdict(taken.covariates),
        }
        for taken in run.ceilings
    ]
    return typed(rows, CEILING_COLUMNS, _TYPES)


def typed(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], types: Mapping[str, Any]) -> pd.DataFrame:
    """Make a frame of `rows`, each column of the type that `types` has for it, even if it is empty or there is no row.

    A cell that a row leaves out is missing, which numpy's booleans and integers cannot be. Made column by column:
    `astype` of all at once takes three times as long.
    """
    made = {}
    for name in columns:
        values = [row.get(name) for row in rows]
        made[name] = pd.array(values, dtype=types[name]) if name in types else values or pd.Series(dtype="object")
    return pd.DataFrame(made, copy=False)


def _with_cases(run: Run, rows: Sequence[Mapping[str, Any]], columns: list[str]) -> pd.DataFrame:
    """Join the rows with the fields of their cases; a column that neither has is empty."""
    cases = [{"case": key, **msgspec.structs.asdict(case)} for key, case in _cases(run).items()]
    own = [name for name in columns if name not in CASE_COLUMNS]
    fields = typed(cases, ["case", *CASE_COLUMNS], _TYPES)
    return typed(rows, own, _TYPES).merge(fields, on="case", how="left")[columns]


def _cases(run: Run) -> dict[str, Case]:
    return {plan.case.key: plan.case for plan in run.manifest.plan}
