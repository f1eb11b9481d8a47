"""Ranks the times of any number of runs, case by case, also where each run has a model or a machine of its own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import pandas as pd

from bench.analysis import estimators, frames
from bench.analysis.frames import CASE_COLUMNS
from bench.analysis.tidy import Tidy, independent_values, timed_phases
from bench.case import Case
from bench.judge.compare import EXIT_NOT_COMPARABLE, differences, judged, kinds, measured_cases
from bench.judge.elsewhere import work
from bench.manifest import ELSEWHERE
from bench.naming import Row
from bench.record import Run
from kvcache.arithmetic.costs import Phase

SUBJECTS = ("model", "strategy", "device", "dtype", "attn_implementation", "n_threads")
"""Fields in which runs may differ as a whole and still be ranked; lengths, batch and seed are the work itself."""

_LENGTHS = [name for name in CASE_COLUMNS if name not in SUBJECTS]
"""Columns of the work itself, batch and seed among them."""

_NEUTRAL: dict[str, Any] = dict.fromkeys(SUBJECTS, "") | {"n_threads": 0}

TIME_COLUMNS = ["ms", "ms_low", "ms_high"]
RATIO_COLUMNS = ["ratio", "ratio_low", "ratio_high"]
COLUMNS: list[str] = [
    *CASE_COLUMNS, "phase", "machine", "run", "name", "rank", *TIME_COLUMNS, *RATIO_COLUMNS, "interval", "verdict"
]  # fmt: skip

BASELINE, NO_COUNTERPART, SEVERAL = "baseline", "not in the baseline", "several in the baseline"


class Lacking(msgspec.Struct, frozen=True, kw_only=True):
    """A case without a time in a run, and why."""

    run: str
    """Its letter; empty where no run has a time."""
    case: Case
    reason: str


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """Where a run stands in a phase: the geometric mean, over what all runs have, of its time / the baseline's."""

    run: str
    ratio: float


@dataclass(frozen=True, eq=False)
class Ranking:
    """The times of several runs beside each other, in groups of what they share."""

    tidies: list[Tidy]
    apart: list[str]
    """The `SUBJECTS` in which a run has no value in common with any other: they are left out of the groups.

    Beside an import also `n_gen`, which need not be equal for its times to be ranked (`bench.judge.elsewhere`).
    """
    entries: pd.DataFrame
    """One row per run, case and phase with a time: `COLUMNS` but for those of the ratio, and `group`, the key of what
    is ranked together. Groups in the order of the first run that has them, each from the fastest on."""
    lacking: list[Lacking]
    """What other runs have a time of and a run has not; what only one run has a time of is not in the entries."""
    nowhere: list[Lacking]
    """What several runs have and none has a time of."""

    @classmethod
    def of(cls, tidies: list[Tidy]) -> Ranking:
        """Rank runs, case by case; cases are the same if they are equal in every field but those in `apart`.

        Runs are sessions, so a ratio between them includes whatever the machine did in between. They may be lean
        (`Tidy.lean`).
        """
        runs = [tidy.run for tidy in tidies]
        cases = [measured_cases(tidy) for tidy in tidies]
        apart = _apart([list(own.values()) for own in cases])
        beside_imports = any(run.manifest.origin is not None for run in runs)
        groups: dict[tuple[str, Phase], list[_Ended]] = {}
        for number, (tidy, own) in enumerate(zip(tidies, cases, strict=True)):
            for case in own.values():
                ended = _Ended(number, case, _why_not(tidy, case, runs))
                for phase in timed_phases(tidy.run, case):
                    shared_work = work(case, phase) if beside_imports else case
                    groups.setdefault((_neutral(shared_work, apart).key, phase), []).append(ended)
        shared = {key: ended for key, ended in groups.items() if any(one.why_not is None for one in ended)}
        rows = [row for (group, phase), ended in shared.items() for row in _rows(group, phase, ended, tidies)]
        entries = pd.DataFrame(rows, columns=["group", *COLUMNS[: COLUMNS.index("ratio")]])
        return cls(
            tidies=tidies,
            apart=[*apart, *(["n_gen"] if beside_imports else [])],
            entries=entries.astype(dict.fromkeys(TIME_COLUMNS, "float64")),
            lacking=list(dict.fromkeys(_lacking(shared.values(), len(runs)))),
            nowhere=list(dict.fromkeys(_nowhere(ended) for key, ended in groups.items() if key not in shared)),
        )

    @property
    def letters(self) -> list[str]:
        """What the runs are called: A, B, ..., Z, AA, ..."""
        return [letter(number) for number in range(len(self.tidies))]

    @property
    def exit_code(self) -> int:
        """3 if no two runs have anything in common, or a run lacks a time that another has; else 0."""
        return EXIT_NOT_COMPARABLE if self.lacking or self.entries.empty else 0

    def against(self, baseline: int = 0) -> pd.DataFrame:
        """Add to the entries their ratio to a run's: `COLUMNS` and `group`.

        A ratio is time / time of the baseline with its unpaired 95 % interval. Its counterpart is the baseline's entry
        of the same group with the same subject, or its only one; of several the one with the same lengths, since beside
        an import a group has prompts and depths of one sum. Without a counterpart the ratio is empty.
        """
        records = frames.records(self.entries)
        own: dict[tuple[str, str], list[Row]] = {}
        for row in records:
            if row["run"] == letter(baseline):
                own.setdefault((row["group"], row["phase"]), []).append(row)
        rows = [
            {"ratio": 1.0, "verdict": BASELINE}
            if row["run"] == letter(baseline)
            else self._ratio(row, own.get((row["group"], row["phase"]), []))
            for row in records
        ]
        ratios = pd.DataFrame(rows, columns=[*RATIO_COLUMNS, "interval", "verdict"], index=self.entries.index)
        return self.entries.join(ratios.astype(dict.fromkeys(RATIO_COLUMNS, "float64")))

    def standings(self, baseline: int = 0) -> dict[str, tuple[int, list[Standing]]]:
        """Rank the runs as a whole: by phase, over how many groups that all runs have, and from the fastest on.

        A run with several entries in a group counts by its fastest.
        """
        found: dict[str, tuple[int, list[Standing]]] = {}
        for phase, rows in self.entries.groupby("phase", sort=False):
            best = rows.pivot_table(index="group", columns="run", values="ms", aggfunc="min")
            best = best.reindex(columns=self.letters).dropna()
            if len(best):
                ratios = best.map(math.log).mean()
                means = (ratios - ratios[letter(baseline)]).map(math.exp).sort_values(kind="stable")
                ranked = [Standing(run=str(run), ratio=float(ratio)) for run, ratio in means.items()]
                found[str(phase)] = (len(best), ranked)
        return found

    def differences(self, baseline: int = 0) -> dict[str, list[str]]:
        """List by run the fields of environment and weights in which it differs from the baseline."""
        own = self.tidies[baseline].run
        return {
            letter(number): differences(own, tidy.run) for number, tidy in enumerate(self.tidies) if number != baseline
        }

    def same_machine(self, number: int, baseline: int = 0) -> bool:
        """Whether what decides times (`Environment.fingerprint`) is that of the baseline."""
        return kinds(self.tidies[number].run) == kinds(self.tidies[baseline].run)

    def _ratio(self, row: Row, others: list[Row]) -> dict[str, Any]:
        alike = _equal(row, others, self.apart)
        counterpart = alike or others
        if len(counterpart) > 1:
            counterpart = _equal(row, counterpart, _LENGTHS) or counterpart
        if len(counterpart) != 1:
            runs = [self._tidy(one).run for one in (row, *others)]
            if any(run.manifest.origin for run in runs):
                return {"verdict": ELSEWHERE}
            return {"verdict": SEVERAL if alike else NO_COUNTERPART}
        ratio = estimators.unpaired_ratio(self._values(row), self._values(counterpart[0]))
        ratio, verdict = judged(ratio, *(self._tidy(one).run for one in (row, counterpart[0])))
        figures = dict(zip(RATIO_COLUMNS, (ratio.estimate, ratio.low, ratio.high), strict=True))
        return {**figures, "interval": "unpaired", "verdict": verdict}

    def _values(self, row: Row) -> list[float]:
        case = Case(**{name: row[name] for name in CASE_COLUMNS})
        return independent_values(self._tidy(row).by_case_and_phase[case.key, row["phase"]])

    def _tidy(self, row: Row) -> Tidy:
        return self.tidies[self.letters.index(row["run"])]


class _Ended(msgspec.Struct, frozen=True):
    """A case of a run, by the run's number, and why it has no time that counts (None: it has)."""

    run: int
    case: Case
    why_not: str | None


def letter(number: int) -> str:
    """Name a run by its place, from 0.

    >>> [letter(number) for number in (0, 25, 26, 27, 702)]
    ['A', 'Z', 'AA', 'AB', 'AAA']
    """
    before, place = divmod(number, 26)
    return (letter(before - 1) if before else "") + chr(ord("A") + place)


def _apart(cases: list[list[Case]]) -> list[str]:
    values = {name: [{getattr(case, name) for case in own} for own in cases] for name in SUBJECTS}
    return [
        name
        for name, by_run in values.items()
        if any(own and own.isdisjoint(set().union(*by_run[:n], *by_run[n + 1 :])) for n, own in enumerate(by_run))
    ]


def _equal(row: Row, others: list[Row], columns: Iterable[str]) -> list[Row]:
    return [other for other in others if all(other[name] == row[name] for name in columns)]


def _neutral(case: Case, apart: Iterable[str]) -> Case:
    return msgspec.structs.replace(case, **{name: _NEUTRAL[name] for name in apart})


def _why_not(tidy: Tidy, case: Case, runs: Sequence[Run]) -> str | None:
    """Say why a time may not stand beside others: its case failed, or its weights are not those of the first run."""
    outcome = tidy.outcomes[case.key]
    if outcome.status != "ok":
        return f"{outcome.status}: {outcome.error}"
    digests = [run.manifest.weights.get(case.model) for run in runs]
    first = next((digest for digest in digests if digest is not None), None)
    return None if tidy.run.manifest.weights.get(case.model) == first else f"the weights of {case.model} differ"


def _rows(group: str, phase: Phase, ended: list[_Ended], tidies: list[Tidy]) -> Iterator[dict[str, Any]]:
    """Make the rows of a group and phase, from the fastest on; none where only one run has a time."""
    timed = [one for one in ended if one.why_not is None]
    if len({one.run for one in timed}) < 2:
        return
    rows = []
    for one in timed:
        tidy = tidies[one.run]
        values = independent_values(tidy.by_case_and_phase[one.case.key, phase])
        times = dict(zip(TIME_COLUMNS, estimators.median_interval(values), strict=True))
        named = {"run": letter(one.run), "name": tidy.run.name, "machine": tidy.run.environment(one.case).hostname}
        rows.append({"group": group, **msgspec.structs.asdict(one.case), "phase": phase, **named, **times})
    for place, row in enumerate(sorted(rows, key=lambda row: row["ms"]), start=1):
        yield {**row, "rank": place}


def _lacking(groups: Iterable[list[_Ended]], n_runs: int) -> Iterator[Lacking]:
    """Find the runs without a time in a group in which another has one."""
    for ended in groups:
        timed = {one.run for one in ended if one.why_not is None}
        example = next(one.case for one in ended if one.why_not is None)
        for number in sorted(set(range(n_runs)) - timed):
            failed = [one for one in ended if one.run == number]
            case = failed[0].case if failed else example
            reason = failed[0].why_not if failed else None
            yield Lacking(run=letter(number), case=case, reason=reason or "not in it")


def _nowhere(ended: list[_Ended]) -> Lacking:
    """Say why no run has a time in a group."""
    return Lacking(run="", case=ended[0].case, reason="; ".join(dict.fromkeys(str(one.why_not) for one in ended)))
