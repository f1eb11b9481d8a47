"""Run -> tidy frames: a row per turn and phase, a row per timed decode step. Nothing is dropped, warm-ups flagged."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bench.case import Case
from bench.record import CeilingSample, Covariates, Run, Sample
from bench.turns import CODED, NONE, Ints, Lists, Turns, alike

CASE_COLUMNS: list[str] = list(Case.__struct_fields__)
"""The fields of a case; every frame of its turns has them after the `case` key."""

COVARIATE_COLUMNS: list[str] = list(Covariates.__struct_fields__)

_TURN: list[str] = ["process", "round", "order", "warmup"]
"""Which turn it was; the fields of a `Sample` and of a `CeilingSample` that say so."""

_COVARIATES = ["wall_ms", *COVARIATE_COLUMNS]

_TIMES = ["latency_ms", "total_ms", "steps_timed"]

TURN_COLUMNS: list[str] = ["sample", "case", *CASE_COLUMNS, "phase", *_TURN, *_TIMES, *_COVARIATES]
STEP_COLUMNS: list[str] = [
    "sample",
    "case",
    *CASE_COLUMNS,
    "machine",
    *_TURN,
    "step",
    "position",
    "latency_ms",
    "first",
]
CEILING_COLUMNS: list[str] = [
    *("cell", "ceiling", "kernel", "n_threads", *_TURN, "per_s", "cache_bytes", "read_bytes"),
    *_COVARIATES,
]

NS_PER_MS = 1e6

_TYPES: dict[str, str] = {
    **{field.name: "int64" for field in msgspec.structs.fields(Case) if field.type is int},
    **dict.fromkeys(["sample", *_TURN], "int64"),
    **dict.fromkeys(["warmup", "first", "prefill_quantized"], "bool"),
    **dict.fromkeys(["latency_ms", "total_ms", "wall_ms", "per_s"], "float64"),
    **dict.fromkeys(["step", "position", "steps_timed", "cache_bytes", "read_bytes", *COVARIATE_COLUMNS], "Int64"),
}
"""The type of every column that is not text."""


def turns(run: Run, columns: Sequence[str] = TURN_COLUMNS) -> pd.DataFrame:
    """Make one row per case, phase and turn, with some or all of `TURN_COLUMNS`; `sample` is its place in the run.

    `latency_ms` is TTFT for prefill and TPOT for decode (`total_ms / (n_gen - 1)`). `total_ms` is the whole phase, with
    the untimed steps of a naive decode interpolated linearly between the timed ones (`bench.case.naive_steps`; beyond
    the outermost of them stands the nearest). `steps_timed` counts the timed decode steps (empty for prefill).
    `wall_ms` is all host time measured in the turn, over both phases: what the covariates, differences over the whole
    turn, relate to. CUDA event times stand for host times where they are stored.
    A case with n_gen = 1 has no decode rows.

    Raises:
        ValueError: no decode step of a turn was timed.
    """
    samples = Turns.of(Sample, run.samples)
    fields = _fields(run, samples)
    n_gen = fields["n_gen"].to_numpy()[samples.coded("case").codes]
    rows = np.repeat(np.arange(len(samples)), np.where(n_gen > 1, 2, 1))
    is_decode = np.diff(rows, prepend=-1) == 0
    prefill_ns, step_ns = device_ns(samples)
    total_ms = np.where(is_decode, _decode_ns(samples, step_ns, n_gen)[rows], prefill_ns[rows]) / NS_PER_MS
    made: dict[str, Any] = {
        "sample": rows,
        "phase": pd.Series(["prefill", "decode"]).array.take(is_decode.astype(np.int64)),
        "total_ms": total_ms,
        "latency_ms": np.where(is_decode, total_ms / np.maximum(n_gen[rows] - 1, 1), total_ms),
        "steps_timed": pd.arrays.IntegerArray(step_ns.lengths[rows], ~is_decode),
        "wall_ms": (wall_ns(samples) / NS_PER_MS)[rows],
    }
    return _frame(samples, fields, rows, made, columns)


def steps(run: Run, wanted: NDArray[np.int64] | None = None) -> pd.DataFrame:
    """Make one row per timed decode step, of all samples or of those `wanted`, by their places in the run.

    `position` is the length of the sequence that the step continues, `n_depth + n_prompt + step`: what naive
    generation feeds in this step, and what the cached step attends to. `first` flags the first step after a prefill,
    `machine` is the host that took it.
    """
    samples = Turns.of(Sample, run.samples)
    wanted = np.arange(len(samples)) if wanted is None else wanted
    fields, (_, step_ns) = _fields(run, samples), device_ns(samples)
    rows = np.repeat(wanted, step_ns.lengths[wanted])
    patterns = [np.array(timed, dtype=np.int64) for timed in samples.coded("steps").distinct]
    own = [patterns[code] for code in samples.coded("steps").codes[wanted]]
    step = np.concatenate([np.zeros(0, dtype=np.int64), *own])
    place = np.arange(len(rows)) - np.repeat(np.cumsum(step_ns.lengths[wanted]), step_ns.lengths[wanted])
    place += step_ns.lengths[rows]
    made = {
        "sample": rows,
        "step": pd.arrays.IntegerArray(step, np.zeros(len(step), dtype=np.bool_)),
        "latency_ms": step_ns.flat[step_ns.starts[rows] + place] / NS_PER_MS,
        "first": step == 1,
    }
    frame = _frame(samples, fields, rows, made, [name for name in STEP_COLUMNS if name != "position"])
    return frame.assign(position=frame["n_depth"] + frame["n_prompt"] + frame["step"])[STEP_COLUMNS]


def ceilings(run: Run) -> pd.DataFrame:
    """Make one row per turn of a ceiling: `per_s` is its rate by the median pass, in bytes or FLOP per second."""
    taken = Turns.of(CeilingSample, run.ceilings)
    threads = {plan.case.cell.key: plan.case.n_threads for plan in run.manifest.plan}
    cells, passes = taken.coded("cell"), taken.lists("pass_ns")
    median_ns = np.zeros(len(taken))
    for length in np.unique(passes.lengths):
        alike = np.flatnonzero(passes.lengths == length)
        median_ns[alike] = np.median(passes.rows(alike, length), axis=1)
    made = {
        "n_threads": np.array([threads[cell] for cell in cells.distinct], dtype=np.int64)[cells.codes],
        "per_s": taken.ints("amount") / median_ns * 1e9,
        "wall_ms": passes.sums / NS_PER_MS,
    }
    no_fields = pd.DataFrame(index=range(len(taken)))
    return _frame(taken, no_fields, np.arange(len(taken)), made, CEILING_COLUMNS)


def device_ns(samples: Turns[Sample]) -> tuple[Ints, Lists]:
    """Return the times of the prefills and of the decode steps, by CUDA events where they were taken."""
    prefill_ns, event_ns = samples.ints("prefill_ns"), samples.ints("prefill_event_ns")
    host, events = samples.lists("step_ns"), samples.lists("step_event_ns")
    by_events = (event_ns != NONE) & (events.lengths >= 0)
    if not by_events.any():
        return prefill_ns, host
    return np.where(by_events, event_ns, prefill_ns), host.replaced(by_events, events)


def wall_ns(samples: Turns[Sample]) -> Ints:
    """Return what each turn took on the host: its prefill and its timed decode steps (`TurnTimes.total_ns`)."""
    return samples.ints("prefill_ns") + samples.lists("step_ns").sums


AT_ONCE = 1 << 22
"""Decode steps that are interpolated at a time."""


def _decode_ns(samples: Turns[Sample], step_ns: Lists, n_gen: Ints) -> NDArray[np.float64]:
    """Compute what all decode steps of each turn took together, those between the timed ones interpolated."""
    patterns, codes = samples.coded("steps").distinct, samples.coded("steps").codes
    total = np.zeros(len(samples))
    for places in alike(codes, n_gen):
        count, timed = int(n_gen[places[0]]), patterns[codes[places[0]]]
        if count == 1:
            continue
        if not timed:
            torn = samples[int(places[0])]
            raise ValueError(f"no decode step of {torn.case} was timed in round {torn.round}")
        for part in np.array_split(places, 1 + len(places) * count // AT_ONCE):
            times = step_ns.rows(part, len(timed)).astype(np.float64)
            total[part] = _interpolated(np.arange(1, count), np.array(timed, dtype=np.float64), times).sum(axis=1)
    return total


def _interpolated(at: Ints, timed: NDArray[np.float64], times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Interpolate linearly as `np.interp(at, timed, row)` for each row of `times`, and to the same bits."""
    if len(timed) == 1:
        return np.repeat(times, len(at), axis=1)
    left = np.clip(np.searchsorted(timed, at, side="right") - 1, 0, len(timed) - 2)
    slopes = np.diff(times, axis=1) / np.diff(timed)
    between = slopes[:, left] * (at - timed[left]) + times[:, left]
    between[:, at < timed[0]] = times[:, :1]
    between[:, at >= timed[-1]] = times[:, -1:]
    return np.ascontiguousarray(between)


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


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a frame as mappings, as `to_dict("records")` does in ten times the time."""
    names, values = [str(name) for name in frame], [frame[name].tolist() for name in frame]
    return [dict(zip(names, row, strict=True)) for row in zip(*values, strict=True)]


def case_fields(run: Run) -> dict[str, dict[str, Any]]:
    """Return, by the key of each planned case, its key as `case`, its fields, and the host that measured it."""
    return {
        case.key: {"case": case.key, **msgspec.structs.asdict(case), "machine": run.environment(case).hostname}
        for case in (plan.case for plan in run.manifest.plan)
    }


def _fields(run: Run, samples: Turns[Sample]) -> pd.DataFrame:
    """Make one row per code of the samples' cases, with their fields and the machine that measured them."""
    fields = case_fields(run)
    rows = [fields[key] for key in samples.coded("case").distinct]
    return typed(rows, ["case", *CASE_COLUMNS, "machine"], _TYPES)


def _frame(
    turns: Turns[Any], fields: pd.DataFrame, rows: Ints, made: Mapping[str, Any], columns: Sequence[str]
) -> pd.DataFrame:
    """Make a frame of `columns`: those `made`, fields of the case, or columns of the turns at the places `rows`."""
    frame: dict[str, Any] = {}
    codes = turns.coded("case").codes[rows] if len(fields.columns) else rows
    for name in columns:
        if name in made:
            frame[name] = made[name]
        elif name in fields:
            frame[name] = fields[name].array.take(codes)
        elif name in CODED:
            coded = turns.coded(name)
            of_codes = pd.Series(coded.distinct, dtype=None if coded.distinct else object).array
            frame[name] = of_codes.take(coded.codes[rows])
        else:
            values = turns.ints(name)[rows]
            nullable = _TYPES[name] == "Int64"
            frame[name] = pd.arrays.IntegerArray(values, values == NONE) if nullable else values.astype(_TYPES[name])
    return pd.DataFrame(frame, copy=False)
