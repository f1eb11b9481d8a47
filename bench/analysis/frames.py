"""Run -> tidy frames: a row per turn and phase, a row per timed decode step. Nothing is dropped, warm-ups flagged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import pandas as pd

from bench.case import Case
from bench.record import Covariates, Run, Sample

CASE_COLUMNS: list[str] = list(Case.__struct_fields__)
"""The fields of a case; every frame repeats them after its `case` key."""

COVARIATE_COLUMNS: list[str] = list(Covariates.__struct_fields__)

TURN_COLUMNS: list[str] = [
    "case",
    *CASE_COLUMNS,
    "phase",
    "process",
    "round",
    "order",
    "warmup",
    "latency_ms",
    "total_ms",
    "steps_timed",
    "wall_ms",
    *COVARIATE_COLUMNS,
]
STEP_COLUMNS: list[str] = [
    "case",
    *CASE_COLUMNS,
    "process",
    "round",
    "order",
    "warmup",
    "step",
    "position",
    "latency_ms",
    "first",
]
CEILING_COLUMNS: list[str] = [
    "cell",
    "ceiling",
    "kernel",
    "n_threads",
    "process",
    "round",
    "order",
    "warmup",
    "per_s",
    "wall_ms",
    "cache_bytes",
    *COVARIATE_COLUMNS,
]

NS_PER_MS = 1e6


def turns(run: Run) -> pd.DataFrame:
    """One row per case, phase and turn.

    `latency_ms` is TTFT for prefill and TPOT for decode (`total_ms / (n_gen - 1)`). `total_ms` is the whole phase, with
    the untimed steps of a naive decode interpolated linearly between the timed ones (`bench.case.naive_steps`; beyond
    the outermost of them stands the nearest). `steps_timed` counts the timed decode steps (empty for prefill).
    `wall_ms` is all host time measured in the turn, over both phases: what the covariates, differences over the whole
    turn, relate to. CUDA event times stand for host times where they are stored.
    A case with n_gen = 1 has no decode rows.
    """
    cases = _cases(run)
    rows: list[dict[str, Any]] = []
    for sample in run.samples:
        case = cases[sample.case]
        shared = {
            **_identity(case, sample),
            "wall_ms": (sample.prefill_ns + sum(sample.step_ns)) / NS_PER_MS,
            **msgspec.structs.asdict(sample.covariates),
        }
        ttft_ms = _prefill_ns(sample) / NS_PER_MS
        rows.append({**shared, "phase": "prefill", "latency_ms": ttft_ms, "total_ms": ttft_ms, "steps_timed": None})
        if case.n_gen > 1:
            total_ms = _decode_ns(case, sample) / NS_PER_MS
            rows.append(
                {
                    **shared,
                    "phase": "decode",
                    "latency_ms": total_ms / (case.n_gen - 1),
                    "total_ms": total_ms,
                    "steps_timed": len(sample.steps),
                }
            )
    types = _types(["steps_timed", *COVARIATE_COLUMNS], ["latency_ms", "total_ms", "wall_ms"])
    return typed(rows, TURN_COLUMNS, types)


def steps(run: Run) -> pd.DataFrame:
    """One row per timed decode step.

    `position` is the length of the sequence that the step continues, `n_depth + n_prompt + step`: what naive
    generation feeds in this step, and what the cached step attends to. `first` flags the first step after a prefill.
    """
    cases = _cases(run)
    rows: list[dict[str, Any]] = []
    for sample in run.samples:
        case = cases[sample.case]
        shared = _identity(case, sample)
        for step, elapsed_ns in zip(sample.steps, _step_ns(sample), strict=True):
            rows.append(
                {
                    **shared,
                    "step": step,
                    "position": case.n_depth + case.n_prompt + step,
                    "latency_ms": elapsed_ns / NS_PER_MS,
                    "first": step == 1,
                }
            )
    return typed(rows, STEP_COLUMNS, _types(["step", "position"], ["latency_ms"]) | {"first": "bool"})


def ceilings(run: Run) -> pd.DataFrame:
    """One row per turn of a ceiling: `per_s` is its rate by the median pass, in bytes or FLOP per second."""
    threads = {plan.case.cell.key: plan.case.n_threads for plan in run.manifest.plan}
    rows: list[dict[str, Any]] = [
        {
            "n_threads": threads[taken.cell],
            "per_s": taken.amount / float(np.median(taken.pass_ns)) * 1e9,
            "wall_ms": sum(taken.pass_ns) / NS_PER_MS,
            **{name: getattr(taken, name) for name in ("cell", "ceiling", "kernel", "process", "round", "order")},
            **{name: getattr(taken, name) for name in ("warmup", "cache_bytes")},
            **msgspec.structs.asdict(taken.covariates),
        }
        for taken in run.ceilings
    ]
    types = dict.fromkeys(["cache_bytes", *COVARIATE_COLUMNS], "Int64")
    types |= {"per_s": "float64", "wall_ms": "float64", "warmup": "bool"}
    types |= dict.fromkeys(["n_threads", "process", "round", "order"], "int64")
    return typed(rows, CEILING_COLUMNS, types)


def typed(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], types: Mapping[str, Any]) -> pd.DataFrame:
    """A frame of `rows`, each column of the type that `types` has for it, also where it is empty or there is no row.

    What a row leaves out is missing, which a truth value or an integer of numpy's cannot be. Made column by column:
    `astype` of all at once takes three times as long.
    """
    made = {}
    for name in columns:
        values = [row.get(name) for row in rows]
        made[name] = pd.array(values, dtype=types[name]) if name in types else values or pd.Series(dtype="object")
    return pd.DataFrame(made, copy=False)


def _cases(run: Run) -> dict[str, Case]:
    return {plan.case.key: plan.case for plan in run.manifest.plan}


def _identity(case: Case, sample: Sample) -> dict[str, Any]:
    return {
        "case": sample.case,
        **msgspec.structs.asdict(case),
        "process": sample.process,
        "round": sample.round,
        "order": sample.order,
        "warmup": sample.warmup,
    }


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


def _types(counts: list[str], times: list[str]) -> dict[str, str]:
    """The types of a frame's columns: these counts, which may be missing, these times, and what every turn has."""
    types = dict.fromkeys(counts, "Int64") | dict.fromkeys(times, "float64") | {"warmup": "bool"}
    types |= dict.fromkeys(["n_threads", "batch_size", "n_prompt", "n_gen", "n_depth", "seed"], "int64")
    return types | dict.fromkeys(["process", "round", "order"], "int64")
