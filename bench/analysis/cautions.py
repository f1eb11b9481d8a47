"""What a reader should know before believing a run: cautions as values, each with what to do about it."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import msgspec
import pandas as pd

from bench.analysis import estimators, frames, roofline, rounds
from bench.analysis.outcomes import unfinished
from bench.record import Run

FIRST_STEP_FACTOR = 10.0
"""A first decode step that takes this many times the median step is no cold cache: something was compiled or set up."""

STALL_FACTOR = 2.0
"""And this many times the slowest of the other steps: on a machine that stalls, any step is slow now and then."""

MAX_DROPPED = 0.2
"""With a larger share of a case's rounds disturbed nothing is concluded from the rest (the gate: inconclusive)."""

MAX_IDLE_SHARE = 0.01
"""CPU time of the arms that should sleep, as a share of the turns' time. One tick of the counter a turn is rounding."""

MAX_INTERVAL_WIDTH = 0.2
"""Width of an interval as a share of its median."""


MAX_SHARE = 1.05
"""A strategy that reads this much faster than the kernels that only read shows that they did not find the roof."""


class Caution(msgspec.Struct, frozen=True, kw_only=True):
    """Something that weakens a figure. `case` is its key, or None where the whole run is meant."""

    case: str | None
    text: str
    advice: str


def cautions(run: Run) -> list[Caution]:
    """Every caution that the records of `run` give rise to, those of the whole run first."""
    measured, lacking = rounds.measured_turns(run), unfinished(run)
    return [
        *_unfinished(run, lacking),
        *_processes(measured),
        *_naive_logits(run),
        *_disturbed(measured),
        *_idle_arms(measured),
        *_first_steps(rounds.usable_steps(run)),
        *_intervals(rounds.usable_turns(run), lacking),
        *_above_the_roof(run),
        *_without_ceilings(run),
    ]


def disturbed(run: Run) -> dict[str, float]:
    """Cases of which too many rounds were disturbed (`MAX_DROPPED`), and the share of those."""
    shares = rounds.measured_turns(run).groupby("case")["disturbed"].mean()
    return {str(case): float(share) for case, share in shares.items() if share > MAX_DROPPED}


def scope(n_processes: int) -> str:
    """Where an interval holds: `within 1 process`, `within 3 processes`, or `over 8 processes`."""
    if n_processes >= rounds.MIN_PROCESSES:
        return f"over {n_processes} processes"
    return f"within {n_processes} process{'es' if n_processes > 1 else ''}"


def _unfinished(run: Run, lacking: Collection[str]) -> Iterator[Caution]:
    if lacking:
        yield Caution(
            case=None,
            text=f"the run was interrupted: {len(lacking)} of {len(run.manifest.plan)} cases lack rounds",
            advice=f"`kvbench run --resume {run.name}` adds them",
        )


def _processes(turns: pd.DataFrame) -> Iterator[Caution]:
    n_processes = turns["process"].nunique()
    if 0 < n_processes < rounds.MIN_PROCESSES:
        yield Caution(
            case=None,
            text=f"the intervals hold {scope(n_processes)}; processes differ by a few percent",
            advice=f"for intervals over processes measure with --processes {rounds.MIN_PROCESSES}",
        )


def _naive_logits(run: Run) -> Iterator[Caution]:
    if any(plan.case.naive_logits == "all" for plan in run.manifest.plan):
        yield Caution(
            case=None,
            text="naive computes the logits of every position, so it pays for the LM head many times over",
            advice="for a fair baseline leave out --naive-logits all",
        )


def _disturbed(turns: pd.DataFrame) -> Iterator[Caution]:
    for case, share in turns.groupby("case", sort=False)["disturbed"].mean().items():
        if share > MAX_DROPPED:
            yield Caution(
                case=str(case),
                text=f"{share:.0%} of the rounds were disturbed by CPU steal or GPU throttling: inconclusive",
                advice="measure again when the machine is quieter, or with more --repetitions",
            )


def _idle_arms(turns: pd.DataFrame) -> Iterator[Caution]:
    totals = turns[turns["idle_arms_ns"].notna()].groupby("case", sort=False)[["idle_arms_ns", "wall_ms"]]
    for case, rows in totals:
        beyond_rounding = (rows["idle_arms_ns"] - rounds.CLOCK_TICK_NS).clip(lower=0)
        share = float(beyond_rounding.sum()) / frames.NS_PER_MS / float(rows["wall_ms"].sum())
        if share > MAX_IDLE_SHARE:
            yield Caution(
                case=str(case),
                text=f"the other strategies' processes, which should sleep, used over {MAX_IDLE_SHARE:.0%} of a core",
                advice="set OMP_WAIT_POLICY=PASSIVE, and see that nothing in the model runs in the background",
            )


def _first_steps(steps: pd.DataFrame) -> Iterator[Caution]:
    for case, rows in steps.groupby("case", sort=False):
        if rows["first"].all():
            continue
        slowest_first, others = rows.loc[rows["first"], "latency_ms"].max(), rows.loc[~rows["first"], "latency_ms"]
        ratio = slowest_first / others.median()
        if ratio >= FIRST_STEP_FACTOR and slowest_first > STALL_FACTOR * others.max():
            yield Caution(
                case=str(case),
                text=f"a first decode step took {ratio:.0f} x the median step: a set-up, or a stall",
                advice="compare its rounds, and measure again on a quieter machine",
            )


def _intervals(turns: pd.DataFrame, lacking: Collection[str]) -> Iterator[Caution]:
    """Of cases that are `lacking` rounds none is missed: they are told to be resumed."""
    for (case, phase), rows in turns.groupby(["case", "phase"], sort=False):
        values = rounds.independent_values(rows)
        median, low, high = estimators.median_interval(values)
        if low is None or high is None:
            if phase == "prefill" and case not in lacking:  # both phases have the same turns
                yield Caution(
                    case=str(case),
                    text=f"no interval: six undisturbed rounds are needed, it has {len(values)}",
                    advice="measure with --repetitions 6 or more",
                )
        elif (high - low) / median > MAX_INTERVAL_WIDTH:
            yield Caution(
                case=str(case),
                text=f"the interval of {phase} is wider than {MAX_INTERVAL_WIDTH:.0%} of its median",
                advice="measure on a quieter machine, or with more --repetitions",
            )


def _above_the_roof(run: Run) -> Iterator[Caution]:
    for (case, phase), row in roofline.columns(run, rounds.by_case_and_phase(run)).items():
        for share, what in (("mbu", "reads at {:.2f} x the bandwidth"), ("mfu", "computes at {:.2f} x the GEMM rate")):
            if row.get(share, 0.0) > MAX_SHARE:
                yield Caution(
                    case=case,
                    text=f"{phase} {what.format(row[share])} measured beside it: that is no ceiling",
                    advice=f"do not trust its {share.upper()}; measure again when the machine is quieter",
                )


def _without_ceilings(run: Run) -> Iterator[Caution]:
    """Ceilings were measured at the start, but not beside these cases: their worker failed on the way."""
    beside = {taken.cell for taken in run.ceilings}
    measured = {sample.case for sample in run.samples}
    for plan in run.manifest.plan:
        if run.manifest.ceilings and plan.case.key in measured and plan.case.cell.key not in beside:
            yield Caution(
                case=plan.case.key,
                text="no ceilings were measured beside it, so it has no MFU, MBU or prediction",
                advice="measure again; the run's messages said why",
            )
