"""Judges the pairs of an A/B: which quantities are still open, and the verdict on each at the end.

Everything is worked out anew from the stored pairs, so a verdict can be recomputed from the file.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bench.ab.figures import figure, is_waiting, sides_ns
from bench.ab.record import NAMES, Ab, PairFailure, PairTimes, SideName
from bench.analysis.tidy import phases
from bench.case import Case
from bench.judge import sequential
from bench.judge.sequential import CONFIRMATION_LOOKS, SCREENING_PAIRS, Call, LogRatios
from bench.judge.verdict import Verdict, VerdictKind
from bench.naming import plural
from kvcache.arithmetic.costs import Phase

LEAST_PAIRS, MOST_PAIRS = SCREENING_PAIRS + CONFIRMATION_LOOKS[0], SCREENING_PAIRS + CONFIRMATION_LOOKS[-1]
"""What a verdict of a change takes, and after how many nothing more is measured."""


class Quantity(NamedTuple):
    """A phase of a case: what gets a verdict."""

    case: Case
    phase: Phase

    @property
    def name(self) -> str:
        """Return its key in what `bench.judge.sequential` decides on."""
        return f"{self.case.key} {self.phase}"


Logs = dict[str, dict[int, float]]
"""The figure of each quantity, by its name, in each pair."""


class Standing(NamedTuple):
    """What is known after some pairs."""

    calls: dict[str, Call]
    flagged: list[str]
    open: list[Quantity]
    pairs: dict[str, int]
    """After how many pairs each quantity was decided; those of an open one so far."""


def quantities_of(cases: Iterable[Case]) -> list[Quantity]:
    """List every phase of every case, in order."""
    return [Quantity(case, phase) for case in cases for phase in phases(case)]


def note(logs: Logs, quantities: Sequence[Quantity], records: Sequence[PairTimes | PairFailure], cores: int) -> None:
    """Put the figures of `records`, measured on a machine with so many usable `cores`, into `logs`."""
    for quantity in quantities:
        for record in _pairs(records, quantity):
            found = figure(record, quantity.phase, quantity.case.n_threads, cores)
            if found is not None:
                logs.setdefault(quantity.name, {})[record.pair] = found


def standing(
    logs: Logs, quantities: Sequence[Quantity], pairs: int, threshold: float, *, final: bool = False
) -> Standing:
    """Work out what the first `pairs` pairs have decided. `final`: no pair follows, so the next look is made now."""
    decided = {quantity.name: pairs for quantity in quantities}
    if pairs < SCREENING_PAIRS:
        return Standing({}, [], list(quantities), decided)
    calls = sequential.screen({name: log_ratios(logs, name, SCREENING_PAIRS) for name in decided}, threshold)
    decided |= dict.fromkeys(calls, SCREENING_PAIRS)
    flagged = [name for name in decided if name not in calls]
    fresh = pairs - SCREENING_PAIRS
    looks = [look for look in CONFIRMATION_LOOKS if look <= fresh]
    if final and looks and fresh not in looks:
        looks.append(fresh)
    for end in (SCREENING_PAIRS + look for look in looks):
        made = sequential.confirm({name: log_ratios(logs, name, end) for name in flagged}, calls, threshold)
        calls |= made
        decided |= dict.fromkeys(made, end)
    return Standing(calls, flagged, [item for item in quantities if item.name not in calls], decided)


def log_ratios(logs: Logs, name: str, end: int) -> LogRatios:
    """Return the figures of a quantity in the first `end` pairs."""
    seen = {pair: log for pair, log in logs.get(name, {}).items() if pair < end}
    screening = tuple(log for pair, log in seen.items() if pair < SCREENING_PAIRS)
    return LogRatios(screening, tuple(log for pair, log in seen.items() if pair >= SCREENING_PAIRS))


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
            given.append(_verdict(quantity, known, logs, _pairs(records, quantity), cores, finished=finished))
        else:
            given.append(_failed(quantity, kind, sides))
    return given


def _verdict(
    quantity: Quantity, known: Standing, logs: Logs, measured: Sequence[PairTimes], cores: int, *, finished: bool
) -> Verdict:
    """Give the verdict on a quantity. All of its figures are those of the pairs that the call was made on."""
    name, n_threads = quantity.name, quantity.case.n_threads
    call, end = known.calls.get(name), known.pairs[name]
    ratios = log_ratios(logs, name, end)
    is_change = call in sequential.DIRECTIONS
    used, alpha = ratios.screening + ratios.fresh, sequential.ALPHA_SAME
    if is_change:
        used, alpha = ratios.fresh, sequential.change_alpha(len(known.flagged))
    elif call == "same":
        alpha = sequential.same_alpha(ratios)
    own = [times for times in measured if (SCREENING_PAIRS if is_change else 0) <= times.pair < end]
    detail = ""
    if call is None:
        detail = f"undecided after {plural(len(own), 'process pair')}"
        if len(own) < LEAST_PAIRS:
            detail += f" (a change takes {LEAST_PAIRS} at least)"
        if end < MOST_PAIRS:
            detail += ", --budget is spent" if finished else ", unfinished"
    elif call == "regression" and is_waiting(own, quantity.phase, n_threads, cores):
        call, detail = None, "the slow-down is mostly time in which head's worker waited for a core"
    times_ns = [found for times in own if (found := sides_ns(times, quantity.phase, n_threads, cores))]
    base_ms, head_ms = (
        float(np.median([found[side] for found in times_ns])) / 1e6 if times_ns else None for side in NAMES
    )
    change: dict[str, float] = {}
    if len(used) >= SCREENING_PAIRS:
        change = sequential.estimate(used, alpha)._asdict()
    elif used:  # too few for an interval that says anything
        change = {"effect": float(np.expm1(np.median(used)))}
    return Verdict(
        case=quantity.case,
        phase=quantity.phase,
        kind=call or "inconclusive",
        quantity="time",
        base=base_ms,
        head=head_ms,
        detail=detail,
        **change,
    )


def _pairs(records: Sequence[PairTimes | PairFailure], quantity: Quantity) -> list[PairTimes]:
    """List the pairs in which a quantity was measured."""
    return [record for record in records if isinstance(record, PairTimes) and record.case == quantity.case.key]


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
        case=quantity.case,
        phase=quantity.phase,
        kind=kind,
        quantity="time",
        detail="; ".join(f"{failure.side} {failure.status}: {failure.error}" for failure in order),
    )
