"""One walk over a run: which turns count, and how each case ended. Computed once, then handed to everything else.

A turn counts if it is no warm-up, if the machine (not the code) did not disturb it, and if its case ended well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import msgspec
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bench.analysis import estimators, frames
from bench.analysis.disturbance import COUNTED, is_disturbed
from bench.analysis.estimators import Ratio
from bench.analysis.rounds import Rounds, planned_rounds
from bench.case import Case
from bench.record import FAULTS, Run, Status, TokensMatch
from bench.turns import Ints, alike
from kvcache.arithmetic.costs import Phase
from kvcache.strategies.catalogue import is_lossy

MIN_PROCESSES = 6
"""With fewer processes there is no exact 95 % interval over processes."""

NOT_MEASURED = "the run ended before this case; `kvbench run --resume` measures it"

MAX_TURNS, MAX_STEPS, MIN_TURNS = 200, 2_000_000, 12
"""See `Tidy.steps`; the latter leaves every case so many turns of each process."""

_COLUMNS = [
    *("sample", "case", "phase", "process", "round", "order", "warmup", "latency_ms", "total_ms", "steps_timed"),
    *("wall_ms", "n_threads", "steal_ns", "throttled_ns", "gpu_throttle_reasons", "idle_arms_ns"),
]
"""Columns of the turns that anything is made of; the others (`frames.TURN_COLUMNS`) would take the most memory."""

_WORST_STATUS: list[Status] = [*FAULTS, "unsupported"]
_WORST_MATCH: list[TokensMatch] = ["false", "tie", "true"]


Columns = Mapping[str, NDArray[Any]]
"""Columns of one length by name."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a case ended, over all of its processes: the worst of each."""

    status: Status
    """`not measured` where the run holds neither a time nor a failure of the case: it ended before."""
    tokens_match: TokensMatch | None
    error: str | None = None

    @property
    def measured(self) -> bool:
        """Whether the run holds a time or a failure of the case."""
        return self.status != "not measured"


@dataclass(frozen=True, eq=False)
class Tidy:
    """What a run's records say, in frames. Its case keys are those of `run.manifest.plan`, in that order."""

    run: Run
    outcomes: dict[str, Outcome]
    """How each planned case ended, by its key. Other tokens are a failure, whichever record reports them."""
    unfinished: list[str]
    """Cases of which a process lacks rounds (`Rounds.missing`), or all do, though they did not fail."""
    measured: pd.DataFrame
    """The turns (`frames.turns`) of timed phases that are no warm-up, with a column `disturbed` (see `_judged`)."""
    turns: pd.DataFrame
    """The turns that every figure is made of: measured, undisturbed, and of cases that ended well.

    A case without any undisturbed turn keeps all of them: a machine that steals from every round has no better ones to
    offer, so its figures are shown, with a caution (`bench.analysis.cautions`) that nothing can be concluded from them.
    """
    ceilings: pd.DataFrame
    """The undisturbed turns of the ceilings (`frames.ceilings`), without warm-ups."""

    @classmethod
    def of(cls, run: Run) -> Tidy:
        """Walk over the records of `run`.

        Raises:
            ValueError: a turn of a case with n_gen > 1 has no timed decode step.
        """
        cases = [plan.case for plan in run.manifest.plan]
        cores = {key: run.environment(case).cores for case in cases for key in (case.key, case.cell.key)}
        rounds = Rounds(run)
        ended = outcomes(run, rounds)
        turns = frames.turns(run, _COLUMNS)
        untimed = {case.key for case in cases if "prefill" not in timed_phases(run, case)}
        if untimed:
            turns = turns[~(turns["case"].isin(untimed) & (turns["phase"] == "prefill"))]
        measured = _judged(turns, turns["case"].map(cores))
        hopeless = measured.groupby("case")["disturbed"].transform("all").astype("bool")
        well = [key for key, outcome in ended.items() if outcome.status == "ok"]
        counts = measured["case"].isin(well) & (~measured["disturbed"] | hopeless)
        roofs = frames.ceilings(run)
        ceilings = _judged(roofs, roofs["cell"].map(cores))
        return cls(
            run=run,
            outcomes=ended,
            unfinished=unfinished(run, ended, rounds),
            measured=measured,
            turns=measured if counts.all() else measured[counts],  # of a million turns it is 250 MB
            ceilings=ceilings[~ceilings["disturbed"]],
        )

    @classmethod
    def lean(cls, run: Run) -> Tidy:
        """Walk over `run` as `of` does, and keep none of its turns themselves, whose steps are most of a large run.

        `steps` is empty then; times of turns, outcomes, checks and the plan are there.
        """
        return replace(cls.of(run), run=msgspec.structs.replace(run, samples=(), ceilings=()))

    @cached_property
    def steps(self) -> pd.DataFrame:
        """The decode steps (`frames.steps`) of `turns`.

        Of a case with more than `MAX_TURNS` turns in a process, or of a run with more than `MAX_STEPS` steps, every
        k-th turn alone: what is drawn and fitted of them grows no better with more.
        """
        turns = self.turns[self.turns["phase"] == "decode"]
        place = turns.groupby(["case", "process"])["round"].rank(method="dense") - 1
        most = 1 + place.max() if len(place) else 1
        every = max(most // MAX_TURNS, min(turns["steps_timed"].sum() // MAX_STEPS, most // MIN_TURNS), 1)
        return frames.steps(self.run, turns["sample"].to_numpy()[(place % every == 0).to_numpy()])

    @cached_property
    def by_case_and_phase(self) -> dict[tuple[str, str], Columns]:
        """The `turns` of each case and phase, by (case key, phase)."""
        names = ["process", "round", "order", "latency_ms", "total_ms", "steps_timed"]
        turns = self.turns[["case", "phase", *names]].fillna({"steps_timed": 0})
        groups = grouped(turns, ["case", "phase"], names)
        return {(case, phase): rows for (case, phase), rows in groups.items()}


def phases(case: Case) -> list[Phase]:
    """List the phases that a case has: with n_gen = 1 nothing is decoded."""
    return ["prefill", "decode"] if case.n_gen > 1 else ["prefill"]


def timed_phases(run: Run, case: Case) -> list[Phase]:
    """List the phases of which a run has a time of its own: an imported generation has no prefill beside it."""
    return ["decode"] if run.manifest.origin is not None and case.n_gen > 1 else phases(case)


def grouped(frame: pd.DataFrame, keys: list[str], names: list[str]) -> dict[tuple[str, ...], Columns]:
    """Split some columns of a frame by the values of its columns `keys`, each group in the order of the frame.

    Thousands of small frames would take a minute to work with; their columns as arrays take a second.
    """
    if frame.empty:
        return {}
    places = alike(*(pd.factorize(frame[key])[0] for key in reversed(keys)))
    labels, columns = [frame[key].to_numpy() for key in keys], {name: frame[name].to_numpy() for name in names}
    return {
        tuple(str(label[own[0]]) for label in labels): {name: values[own] for name, values in columns.items()}
        for own in places
    }


def outcomes(run: Run, rounds: Rounds | None = None) -> dict[str, Outcome]:
    """Find how each planned case ended, by its key (`Tidy.outcomes`)."""
    rounds = Rounds(run) if rounds is None else rounds
    repetitions = _repetitions(run)
    matches: dict[str, list[TokensMatch]] = {plan.case.key: [] for plan in run.manifest.plan}
    worst: dict[str, tuple[Status, str]] = {}
    for check in run.checks:
        matches[check.case].append(check.tokens_match)
    for failure in run.failures:
        measured = len(rounds.measured.get((failure.case, failure.process), ()))
        if failure.worker_died and measured and measured >= repetitions[failure.case]:
            continue  # in a resumed run another worker did all the rounds
        matches[failure.case] += [failure.tokens_match] if failure.tokens_match is not None else []
        known = worst.get(failure.case)
        if known is None or _WORST_STATUS.index(failure.status) < _WORST_STATUS.index(known[0]):
            worst[failure.case] = (failure.status, failure.error)
    timed = {case for case, _ in rounds.measured}
    cells = {plan.case.key: plan.case.cell.key for plan in run.manifest.plan}
    lossy = {plan.case.key for plan in run.manifest.plan if is_lossy(plan.case.strategy)}
    left_out = {plan.cell: plan.left_out for plan in run.cell_plans}
    return {
        key: _outcome(found, worst.get(key), key in timed, left_out.get(cells[key]), lossy=key in lossy)
        for key, found in matches.items()
    }


def unfinished(run: Run, ended: dict[str, Outcome] | None = None, rounds: Rounds | None = None) -> list[str]:
    """List the cases that `kvbench run --resume` would go on with (`Tidy.unfinished`)."""
    rounds = Rounds(run) if rounds is None else rounds
    ended = outcomes(run, rounds) if ended is None else ended
    repetitions = _repetitions(run)
    left_out = {plan.cell for plan in run.cell_plans if plan.left_out}
    never = {plan.case.key for plan in run.manifest.plan if plan.case.cell.key not in left_out}
    never -= {case for case, _ in rounds.measured}
    return [
        key
        for key, outcome in ended.items()
        if outcome.status in ("ok", "not measured")
        and (
            key in never
            or any(rounds.missing([key], process, repetitions[key]) for process in range(run.manifest.processes))
        )
    ]


def independent_values(rows: Columns, column: str = "latency_ms") -> list[float]:
    """List the values of `column` that an interval resamples, from rows that repeat one measurement (one per turn).

    Processes differ by a few percent (address layout, allocator). Where there are enough of them for an interval, the
    median of each process is one value; below that each turn is one, and the interval holds within those processes.
    """
    process, values = np.asarray(rows["process"]), np.asarray(rows[column])
    found = np.unique(process)
    if len(found) < MIN_PROCESSES:
        return [float(value) for value in values]
    return [float(np.median(values[process == number])) for number in found]


def paired_ratio(above: Columns, below: Columns, column: str) -> Ratio | None:
    """Divide `column` of `above` by that of `below` over the rounds that both have; None where they share none.

    Both have a row per process and round. From `MIN_PROCESSES` processes each gives one ratio, and the
    interval is over the processes.
    """
    first, second = _pairs(above, below)
    if not len(first):
        return None
    over, under, process = above[column][first], below[column][second], above["process"][first]
    found = np.unique(process)
    if len(found) < MIN_PROCESSES:
        return estimators.paired_ratio(over, under)
    ratios = [
        estimators.paired_ratio(over[own], under[own]).estimate for own in (process == number for number in found)
    ]
    return estimators.paired_ratio(ratios, [1.0] * len(ratios))


def _pairs(above: Columns, below: Columns) -> tuple[Ints, Ints]:
    """Find the rows of both that are of the same process and round, as their places in each."""
    keys = [rows["process"] * 2**32 + rows["round"] for rows in (above, below)]
    order = np.argsort(keys[1], kind="stable")
    left, right = (np.searchsorted(keys[1][order], keys[0], side) for side in ("left", "right"))
    lengths = right - left
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.repeat(np.arange(len(keys[0])), lengths), order[np.repeat(left, lengths) + within]


def paired_columns(names: list[str], above: Columns, below: Columns, column: str) -> dict[str, float | None]:
    """Name a `paired_ratio`, its lower and its upper end, for a row of a frame; nothing where there is none."""
    ratio = paired_ratio(above, below, column)
    return {} if ratio is None else dict(zip(names, (ratio.estimate, ratio.low, ratio.high), strict=True))


def _repetitions(run: Run) -> dict[str, int]:
    """Count the rounds that each case is to have in a process, by its key."""
    plans = {plan.cell: plan for plan in run.cell_plans}
    asked = run.manifest.repetitions
    return {plan.case.key: planned_rounds(plans.get(plan.case.cell.key), asked) for plan in run.manifest.plan}


def _outcome(
    matches: list[TokensMatch], failure: tuple[Status, str] | None, timed: bool, left_out: str | None, *, lossy: bool
) -> Outcome:
    match = min(matches, key=_WORST_MATCH.index, default=None)
    if failure is not None:
        return Outcome(status=failure[0], tokens_match=match, error=failure[1])
    if match == "false" and not lossy:
        return Outcome(status="failed", tokens_match=match, error="emitted other tokens")
    if not timed:
        return Outcome(status="not measured", tokens_match=match, error=left_out or NOT_MEASURED)
    return Outcome(status="ok", tokens_match=match)


def _judged(turns: pd.DataFrame, cores: pd.Series[int]) -> pd.DataFrame:
    """Keep the turns that are no warm-up, with a column `disturbed` (`bench.analysis.disturbance`).

    `cores` are those of the machine that took each turn.
    """
    turns, cores = turns[~turns["warmup"]], cores[~turns["warmup"]]
    known = {name: turns[name].fillna(0).astype("int64") for name in COUNTED}
    wall_ns = frames.NS_PER_MS * turns["wall_ms"]
    return turns.assign(disturbed=is_disturbed(**known, wall_ns=wall_ns, n_threads=turns["n_threads"], cores=cores))
