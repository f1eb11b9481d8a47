"""Which turns count: no warm-ups, no turns that the machine (not the code) disturbed, no cases that failed."""

from __future__ import annotations

import pandas as pd

from bench.analysis import frames
from bench.analysis.outcomes import outcomes
from bench.record import Run

STEAL_SHARE = 0.05
"""A turn is disturbed if the hypervisor took more than this share of the CPU time that its threads could use."""

CLOCK_TICK_NS = 10_000_000
"""Linux counts CPU time in ticks of 10 ms: a single one in a turn is the rounding of a counter, not a disturbance."""

GPU_SLOWDOWN_REASONS = 0x08 | 0x20 | 0x40 | 0x80
"""NVML throttle reasons from outside the code (nvml.h, nvmlClocksThrottleReason*): hardware slowdown, software and
hardware thermal slowdown, power brake. The software power cap (0x04) is left out: heavy kernels cause it."""

MIN_PROCESSES = 6
"""With fewer processes there is no exact 95 % interval over processes."""


def measured_turns(run: Run) -> pd.DataFrame:
    """The turns (`bench.analysis.frames.turns`) that are no warm-up, with a column `disturbed`.

    A turn is disturbed if more than `STEAL_SHARE` of wall time x threads was stolen (and more than one clock tick),
    or if the GPU was throttled from outside. Steal is counted on all cores, but it only falls on cores that have work,
    which in a turn are those of the arm's own threads; hence threads, not cores. A turn is never judged by its time,
    nor by context switches, page faults or stalls, which the code itself may cause.
    """
    turns = frames.turns(run)
    return _judged(turns[~turns["warmup"]], run.manifest.environment.cores)


def usable_ceilings(run: Run) -> pd.DataFrame:
    """The undisturbed turns of the ceilings (`bench.analysis.frames.ceilings`), without warm-ups."""
    turns = frames.ceilings(run)
    turns = _judged(turns[~turns["warmup"]], run.manifest.environment.cores)
    return turns[~turns["disturbed"]]


def usable_turns(run: Run) -> pd.DataFrame:
    """The turns that every figure is made of: measured, undisturbed, and of cases that ended well.

    A case without any undisturbed turn keeps all of them: a machine that steals from every round has no better ones to
    offer, so its figures are shown, with a caution (`bench.analysis.cautions`) that nothing can be concluded from them.
    """
    turns = measured_turns(run)
    hopeless = turns.groupby("case")["disturbed"].transform("all").astype("bool")
    well = [key for key, outcome in outcomes(run).items() if outcome.status == "ok"]
    return turns[turns["case"].isin(well) & (~turns["disturbed"] | hopeless)]


def by_case_and_phase(run: Run) -> dict[tuple[str, str], pd.DataFrame]:
    """The `usable_turns` of each case and phase, by (case key, phase)."""
    groups = usable_turns(run).groupby(["case", "phase"])
    return {(str(case), str(phase)): rows for (case, phase), rows in groups}


def usable_steps(run: Run) -> pd.DataFrame:
    """The decode steps (`bench.analysis.frames.steps`) of the `usable_turns`."""
    steps = frames.steps(run)
    turns = usable_turns(run)[["case", "process", "round"]].drop_duplicates()
    return steps[~steps["warmup"]].merge(turns, on=["case", "process", "round"])


def _judged(turns: pd.DataFrame, cores: int) -> pd.DataFrame:
    threads = turns["n_threads"].clip(upper=cores)
    steal_ns = turns["steal_ns"].fillna(0).astype("int64")
    allowed_ns = (STEAL_SHARE * frames.NS_PER_MS * turns["wall_ms"] * threads).clip(lower=CLOCK_TICK_NS)
    throttled = turns["gpu_throttle_reasons"].fillna(0).astype("int64") & GPU_SLOWDOWN_REASONS
    return turns.assign(disturbed=(steal_ns > allowed_ns) | (throttled != 0))


def independent_values(rows: pd.DataFrame, column: str = "latency_ms") -> list[float]:
    """The values of `column` that an interval resamples, from rows that repeat one measurement (one per turn).

    Processes differ by a few percent (address layout, allocator). Where there are enough of them for an interval, the
    median of each process is one value; below that each turn is one, and the interval holds within those processes.
    """
    if rows["process"].nunique() < MIN_PROCESSES:
        return rows[column].to_list()
    return rows.groupby("process")[column].median().to_list()
