"""Run -> tidy frames: a row per turn and phase, a row per timed decode step. Nothing is dropped, warm-ups flagged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import pandas as pd

from bench.case import Case
from bench.record import CeilingSample, Covariates, Run, Sample

CASE_COLUMNS: list[str] = list(Case.__struct_fields__)
"""The fields of a case; every frame of its turns has them after the `case` key."""

COVARIATE_COLUMNS: list[str] = list(Covariates.__struct_fields__)

_TURN: list[str] = ["process", "round", "order", "warmup"]
"""Which turn it was; the fields of a `Sample` and of a `CeilingSample` that say so."""

TURN_COLUMNS: list[str] = [
    "case",
    *CASE_COLUMNS,
    "phase",
    *_TURN,
    "latency_ms",
    "total_ms",
    "steps_timed",
    "wall_ms",
    *COVARIATE_COLUMNS,
]
STEP_COLUMNS: list[str] = ["case", *CASE_COLUMNS, *_TURN, "step", "position", "latency_ms", "first"]
CEILING_COLUMNS: list[str] = [
    "cell",
    "ceiling",
    "kernel",
    "n_threads",
    *_TURN,
    "per_s",
    "wall_ms",
    "cache_bytes",
    *COVARIATE_COLUMNS,
]

NS_PER_MS = 1e6

_TYPES: dict[str, str] = {
    **{field.name: "int64" for field in msgspec.structs.fields(Case) if field.type is int},
    **dict.fromkeys(_TURN, "int64"),
    **dict.fromkeys(["warmup", "first"], "bool"),
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
    return _with_cases(
        run, (row for sample in run.samples for row in _phases(cases[sample.case], sample)), TURN_COLUMNS
    )


def steps(run: Run) -> pd.DataFrame:
    """Make one row per timed decode step.

    `position` is the length of the sequence that the step continues, `n_depth + n_prompt + step`: what naive
    generation feeds in this step, and what the cached step attends to. `first` flags the first step after a prefill.
    """
    rows = (
        {"case": sample.case, **_turn(sample), "step": step, "latency_ms": ns / NS_PER_MS, "first": step == 1}
        for sample in run.samples
        for step, ns in zip(sample.steps, _step_ns(sample), strict=True)
    )
    frame = _with_cases(run, rows, STEP_COLUMNS)
    return frame.assign(position=frame["n_depth"] + frame["n_prompt"] + frame["step"])


def ceilings(run: Run) -> pd.DataFrame:
    """Make one row per turn of a ceiling: `per_s` is its rate by the median pass, in bytes or FLOP per second."""
    threads = {plan.case.cell.key: plan.case.n_threads for plan in run.manifest.plan}
    rows: list[dict[str, Any]] = [
        {
            **{name: getattr(taken, name) for name in ("cell", "ceiling", "kernel", "cache_bytes")},
            **_turn(taken),
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


def _with_cases(run: Run, rows: Iterator[dict[str, Any]], columns: list[str]) -> pd.DataFrame:
    """The rows, joined with the fields of their cases; a column that neither has is empty."""
    cases = [{"case": key, **msgspec.structs.asdict(case)} for key, case in _cases(run).items()]
    own = [name for name in columns if name not in CASE_COLUMNS]
    fields = typed(cases, ["case", *CASE_COLUMNS], _TYPES)
    return typed(list(rows), own, _TYPES).merge(fields, on="case", how="left")[columns]


def _cases(run: Run) -> dict[str, Case]:
    return {plan.case.key: plan.case for plan in run.manifest.plan}


def _phases(case: Case, sample: Sample) -> Iterator[dict[str, Any]]:
    shared = {
        "case": sample.case,
        **_turn(sample),
        "wall_ms": sample.total_ns / NS_PER_MS,
        **msgspec.structs.asdict(sample.covariates),
    }
    ttft_ms = _prefill_ns(sample) / NS_PER_MS
    yield {**shared, "phase": "prefill", "latency_ms": ttft_ms, "total_ms": ttft_ms}
    if case.n_gen > 1:
        total_ms = _decode_ns(case, sample) / NS_PER_MS
        tpot_ms = total_ms / (case.n_gen - 1)
        timed = len(sample.steps)
        yield {**shared, "phase": "decode", "latency_ms": tpot_ms, "total_ms": total_ms, "steps_timed": timed}


def _turn(sample: Sample | CeilingSample) -> dict[str, Any]:
    return {name: getattr(sample, name) for name in _TURN}


def _prefill_ns(sample: Sample) -> int:
    return sample.prefill_ns if sample.prefill_event_ns is None else sample.prefill_event_ns


def _step_ns(sample: Sample) -> list[int]:
    return sample.step_ns if sample.step_event_ns is None else sample.step_event_ns


def _decode_ns(case: Case, sample: Sample) -> float:
    """Time of all decode steps. Where not all were timed, a step depends on its length alone: the rest is between."""
    if not sample.steps:
        raise ValueError(f"no decode step of {sample.case} was timed in round {sample.round}")
    every_step = np.arange(1, case.n_gen)
    return float(np.interp(every_step, sample.steps, _step_ns(sample)).sum())
