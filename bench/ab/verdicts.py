"""Judges the pairs of an A/B: which quantities are still open, and the verdict on each at the end.

Everything is worked out anew from the stored pairs, so a verdict can be recomputed from the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bench.ab.record import NAMES, Ab, PairFailure, PairTimes, SideName, Turn
from bench.analysis.disturbance import is_disturbed
from bench.analysis.summary import phases
from bench.case import Case
from bench.judge import sequential
from bench.judge.sequential import CONFIRMATION_LOOKS, SCREENING_PAIRS, Call, LogRatios
from bench.judge.verdict import Verdict, VerdictKind
from kvcache.arithmetic.costs import Phase

LEAST_PAIRS, MOST_PAIRS = SCREENING_PAIRS + CONFIRMATION_LOOKS[0], SCREENING_PAIRS + CONFIRMATION_LOOKS[-1]
"""What a verdict of a change takes, and after how many nothing more is measured."""

WAITING_SHARE = 0.5
"""A slow-down of which head's workers spent more than this share waiting for a core is none of the code."""


class Quantity(NamedTuple):
    """A phase of a case: what gets a verdict."""

    case: Case
    phase: Phase

    @property
    def name(self) -> str:
        """Its key in what `bench.judge.sequential` decides on."""
        return f"{self.case.key} {self.phase}"


Logs = dict[str, dict[int, float]]
"""The figure of each quantity, by its name, in each pair."""


class Standing(NamedTuple):
    """What is known after some pairs."""

    figures: dict[str, LogRatios]
    """Of each quantity; of a decided one those that it was decided on."""
    flagged: list[str]
    calls: dict[str, Call]
    open: list[Quantity]


def note(logs: Logs, quantities: Sequence[Quantity], records: Sequence[PairTimes | PairFailure], cores: int) -> None:
    """Put the figures of `records`, measured on a machine with so many usable `cores`, into `logs`."""
    measured = [record for record in records if isinstance(record, PairTimes)]
    for quantity in quantities:
        for record in (record for record in measured if record.case == quantity.case.key):
            found = figure(record, quantity.phase, quantity.case.n_threads, cores)
            if found is not None:
                logs.setdefault(quantity.name, {})[record.pair] = found


def standing(
    logs: Logs, quantities: Sequence[Quantity], pairs: int, threshold: float, *, final: bool = False
) -> Standing:
    """Work out what the first `pairs` pairs have decided. `final`: no pair follows, so the next look is made now."""

    def seen(end: int) -> dict[str, LogRatios]:
        return {
            quantity.name: LogRatios(
                tuple(value for pair, value in own.items() if pair < min(end, SCREENING_PAIRS)),
                tuple(value for pair, value in own.items() if SCREENING_PAIRS <= pair < end),
            )
            for quantity in quantities
            for own in [logs.get(quantity.name, {})]
        }

    if pairs < SCREENING_PAIRS:
        return Standing(seen(pairs), [], {}, list(quantities))
    screened = seen(SCREENING_PAIRS)
    calls = sequential.screen(screened, threshold)
    figures = {name: screened[name] for name in calls}
    flagged = [name for name in screened if name not in calls]
    fresh = pairs - SCREENING_PAIRS
    looks = [look for look in CONFIRMATION_LOOKS if look <= fresh]
    if final and looks and fresh not in looks:
        looks.append(fresh)
    for look in looks:
        now = seen(SCREENING_PAIRS + look)
        made = sequential.confirm({name: now[name] for name in flagged}, calls, threshold)
        calls |= made
        figures |= {name: now[name] for name in made}
    return Standing(seen(pairs) | figures, flagged, calls, [item for item in quantities if item.name not in calls])


def stored_verdicts(ab: Ab) -> list[Verdict]:
    """Work out the verdicts of a stored A/B from its pairs."""
    manifest = ab.manifest
    threshold, cores = manifest.settings.threshold, manifest.environment.cores
    return verdicts(ab.records, manifest.cases, threshold, cores, finished=ab.finished)


def verdicts(
    records: Sequence[PairTimes | PairFailure],
    cases: Sequence[Case],
    threshold: float,
    cores: int,
    *,
    finished: bool = True,
) -> list[Verdict]:
    """Give the verdict on every case and phase: what was decided before base failed stands.

    `cores` are those that the machine could use at once (`Environment.cores`): more threads cannot lose more time.

    Of an A/B that was not `finished` the last pair may lack cases, and its end was nobody's choice of a look: it says
    what it had said when it began that pair.
    """
    last = max((record.pair for record in records), default=-1 if finished else 0)
    pairs = last + 1 if finished else last
    failures: dict[str, dict[SideName, PairFailure]] = {}
    for record in records:
        if isinstance(record, PairFailure):
            failures.setdefault(record.case, {})[record.side] = record
    quantities, logs = quantities_of(cases), Logs()
    note(logs, quantities, records, cores)
    known = standing(logs, quantities, pairs, threshold, final=finished)
    nothing_ran = all(_is_unsupported(failures.get(case.key, {})) for case in cases)
    given = []
    for quantity in quantities:
        sides = failures.get(quantity.case.key, {})
        kind = "failed" if nothing_ran else _kind_of_failure(sides)
        if kind is None or (kind == "missing" and quantity.name in known.calls):
            given.append(_verdict(quantity, known, records, pairs, cores, finished=finished))
        else:
            given.append(_failed(quantity, kind, sides))
    return given


def _verdict(
    quantity: Quantity,
    known: Standing,
    records: Sequence[PairTimes | PairFailure],
    pairs: int,
    cores: int,
    *,
    finished: bool,
) -> Verdict:
    figures, call = known.figures[quantity.name], known.calls.get(quantity.name)
    own = [
        record
        for record in records
        if isinstance(record, PairTimes) and record.pair < pairs and record.case == quantity.case.key
    ]
    used, alpha = figures.screening + figures.fresh, sequential.ALPHA_SAME
    if call in sequential.DIRECTIONS:
        used, alpha = figures.fresh, sequential.change_alpha(len(known.flagged))
    elif call == "same":
        alpha = sequential.same_alpha(figures)
    detail = ""
    if call is None:
        detail = f"undecided after {len(own)} process pair{'s' * (len(own) != 1)}"
        if len(own) < LEAST_PAIRS:
            detail += f" (a change takes {LEAST_PAIRS} at least)"
        if pairs < MOST_PAIRS:
            detail += ", --budget is spent" if finished else ", unfinished"
    elif call == "regression" and _is_waiting(own[SCREENING_PAIRS:], quantity, cores):
        call, detail = None, "the slow-down is mostly time in which head's worker waited for a core"
    base_ms, head_ms = (_median_ms(own, quantity, side, cores) for side in NAMES)
    change: dict[str, float] = {}
    if len(used) >= SCREENING_PAIRS:
        change = sequential.estimate(used, alpha)._asdict()
    elif used:  # too few for an interval that says anything
        change = {"effect": float(np.expm1(np.median(used)))}
    return Verdict(
        case=quantity.case.key,
        phase=quantity.phase,
        kind=call or "inconclusive",
        quantity="time",
        base=base_ms,
        head=head_ms,
        detail=detail,
        **change,
    )


def _kind_of_failure(sides: Mapping[SideName, PairFailure]) -> VerdictKind | None:
    """Judge by the failures: head's count against it; what one side alone, or neither, can do is not compared."""
    if not sides:
        return None
    if "head" in sides and sides["head"].status != "unsupported":
        return "failed"
    return "not-comparable" if _is_unsupported(sides) else "missing"


def _is_unsupported(sides: Mapping[SideName, PairFailure]) -> bool:
    """Return whether neither side can run the case."""
    return [failure.status for failure in sides.values()] == ["unsupported"] * len(NAMES)


def _failed(quantity: Quantity, kind: VerdictKind, sides: Mapping[SideName, PairFailure]) -> Verdict:
    order = sorted(sides.values(), key=lambda failure: failure.side, reverse=True)  # head's leads: it is judged
    return Verdict(
        case=quantity.case.key,
        phase=quantity.phase,
        kind=kind,
        quantity="time",
        detail="; ".join(f"{failure.side} {failure.status}: {failure.error}" for failure in order),
    )


def quantities_of(cases: Iterable[Case]) -> list[Quantity]:
    """List every phase of every case, in order."""
    return [Quantity(case, phase) for case in cases for phase in phases(case)]


def _median_ms(own: Sequence[PairTimes], quantity: Quantity, side: SideName, cores: int) -> float | None:
    """Return the median over pairs of the times that the figures are made of."""
    kept = ((undisturbed(record, quantity.case.n_threads, cores)[side], record.lockstep) for record in own)
    times_ns = [side_ns(turns, quantity.phase, lockstep=lockstep) for turns, lockstep in kept if turns]
    return float(np.median(times_ns)) / 1e6 if times_ns else None


def _is_waiting(own: Sequence[PairTimes], quantity: Quantity, cores: int) -> bool:
    """Return whether head waited longer for a core than base by most of what it is slower by (medians over pairs).

    What the fastest turn is slower by is in every turn, so the shortest wait of each side's turns is what counts; where
    every turn counts, so does its wait.
    """
    phase, slower, waited = quantity.phase, [], []
    for record in own:
        base, head = undisturbed(record, quantity.case.n_threads, cores).values()
        if not base:
            continue
        waits = [[wait for turn in turns if (wait := _waited_ns(turn, phase)) is not None] for turns in (base, head)]
        if [len(found) for found in waits] != [len(base), len(head)]:
            return False
        steps = len(base[0].step_ns) if phase == "decode" else 1
        before_ns, now_ns = (steps * side_ns(turns, phase, lockstep=record.lockstep) for turns in (base, head))
        slower.append(now_ns - before_ns)
        shortest = np.mean if averages(phase, lockstep=record.lockstep) else np.min
        waited.append(float(shortest(waits[1]) - shortest(waits[0])))
    return bool(slower) and float(np.median(waited)) > WAITING_SHARE * max(0.0, float(np.median(slower)))


def _waited_ns(turn: Turn, phase: Phase) -> int | None:
    """Return how long a turn waited for a core: in this phase where that is known separately, otherwise in both."""
    if turn.waited_ns is None or turn.prefill_waited_ns is None:
        return turn.waited_ns
    return turn.prefill_waited_ns if phase == "prefill" else turn.waited_ns - turn.prefill_waited_ns


def figure(times: PairTimes, phase: Phase, n_threads: int, cores: int) -> float | None:
    """Return the pair's figure: log of head's time / base's, both by `side_ns`; None where every turn was disturbed."""
    base, head = undisturbed(times, n_threads, cores).values()
    if not base:
        return None
    return math.log(side_ns(head, phase, lockstep=times.lockstep) / side_ns(base, phase, lockstep=times.lockstep))


def undisturbed(times: PairTimes, n_threads: int, cores: int) -> dict[SideName, list[Turn]]:
    """Return base's and head's turns, without those that are disturbed (by the rule of every run), and their opposites.

    The other side's turn goes too, so that both have as many: of more, the fastest is faster.
    """
    both = zip(*([turn for turn in times.turns if turn.side == name] for name in NAMES), strict=True)
    kept = [pair for pair in both if not any(_is_disturbed(turn, n_threads, cores) for turn in pair)]
    return {name: [pair[at] for pair in kept] for at, name in enumerate(NAMES)}


def side_ns(turns: Sequence[Turn], phase: Phase, *, lockstep: bool) -> float:
    """Return a side's TTFT or TPOT over its `turns`, of which there is one at least.

    The decode has each of its steps as fast as in the fastest turn, and of prefills it is the fastest: other programs
    only ever add to a time, and on a shared machine they add to many, a different share on each side. What a change
    adds to every step, or to the same step of every turn, shows in the fastest; a cost whose place differs from turn to
    turn does not, however regular it is.

    Prefills in lockstep are too few for that, and each saw the same machine as the other side's, so that what it added
    is in both: their geometric mean.
    """
    if phase == "decode":
        return float(np.min([turn.step_ns for turn in turns], axis=0).mean())
    prefills_ns = [turn.prefill_ns for turn in turns]
    return float(np.exp(np.mean(np.log(prefills_ns)))) if averages(phase, lockstep=lockstep) else min(prefills_ns)


def averages(phase: Phase, *, lockstep: bool) -> bool:
    """Return whether every turn counts for a side's time, not the fastest alone."""
    return lockstep and phase == "prefill"


def _is_disturbed(turn: Turn, n_threads: int, cores: int) -> bool:
    return bool(
        is_disturbed(
            steal_ns=turn.steal_ns or 0,
            throttled_ns=turn.throttled_ns or 0,
            wall_ns=turn.wall_ns,
            n_threads=n_threads,
            cores=cores,
        )
    )
