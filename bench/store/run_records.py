"""The records of a run, read from its samples files and checked: turns into columns, the others as they are."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from bench.errors import DataError
from bench.manifest import Manifest
from bench.record import CeilingSample, CellPlan, Check, Failure, JobStart, Record, Run, Sample, Text
from bench.store import checked_lines
from bench.store.checked_lines import Closing, Part
from bench.store.in_processes import mapped
from bench.store.samples_files import decode_record, refuse_impossible, subject
from bench.turns import NONE, Coded, Column, Lists, Turns


class Records:
    """Collects the records of a run; `planned` are the keys of its cases and cells."""

    def __init__(self, planned: Collection[str]) -> None:
        self._planned = frozenset(planned)
        self._parts: list[_Sorted] = []

    def read(self, path: Path, digest: str) -> None:
        """Add the records of a file whose first line continues `digest`; a large one is read by several processes.

        Raises:
            DataError: it is damaged, or holds a case that is not planned, or a time that was never measured.
        """
        try:
            self._parts += mapped(self._sorted, checked_lines.parts(path, digest))
        except EOFError as error:
            what = "a process that read it was killed; there may be too little memory"
            raise DataError(f"{path}: {what}") from error

    def run(self, folder: Path, manifest: Manifest) -> Run:
        """Return the run that the records are of; no more can be added."""
        others = run_of(folder, manifest, [record for part in self._parts for record in part.others], {})
        samples, ceilings = [part.samples for part in self._parts], [part.ceilings for part in self._parts]
        self._parts.clear()
        return msgspec.structs.replace(
            others, samples=Turns.joined(Sample, samples), ceilings=Turns.joined(CeilingSample, ceilings)
        )

    def _sorted(self, part: Part) -> _Sorted:
        """Read a part of a file, check its records and sort them."""
        path = part.path
        kinds: dict[type, list[Any]] = {Sample: [], CeilingSample: []}
        lines = part.records(decode_record)
        for line in lines:
            kinds.setdefault(type(line), []).append(line)
        records: list[Any] = lines[:-1] if kinds.pop(Closing, None) else lines
        if JobStart in kinds:
            raise DataError(f"{path}: does not begin as a samples file of a run without jobs")
        others = [record for record in records if not isinstance(record, Sample | CeilingSample)]
        subjects = {*(one.case for one in kinds[Sample]), *(one.cell for one in kinds[CeilingSample])}
        unplanned = subjects.union(map(subject, others)) - self._planned
        if unplanned:
            raise DataError(f"{path}: holds a case that the manifest does not plan: {min(unplanned)}")
        try:
            samples, ceilings = Turns.of(Sample, kinds[Sample]), Turns.of(CeilingSample, kinds[CeilingSample])
        except OverflowError as error:
            where = f"{path}, line {part.lines_before() + 1} or later"
            raise DataError(f"{where}: a number has more than 64 bits") from error
        if _doubtful(samples.columns) or _doubtful(ceilings.columns):
            for number, record in enumerate(records, start=part.lines_before() + 1):
                refuse_impossible(record, path, number)
        return _Sorted(samples, ceilings, others)


class _Sorted(NamedTuple):
    """The records of a part of a file."""

    samples: Turns[Sample]
    ceilings: Turns[CeilingSample]
    others: list[Record]


def run_of(folder: Path, manifest: Manifest, records: Sequence[Record], starts: dict[str, JobStart]) -> Run:
    """Make a run of the records of its samples files that count, and of the starts of its jobs."""
    return Run(
        path=str(folder),
        manifest=manifest,
        samples=Turns.of(Sample, [record for record in records if isinstance(record, Sample)]),
        checks=[record for record in records if isinstance(record, Check)],
        failures=[record for record in records if isinstance(record, Failure)],
        ceilings=Turns.of(CeilingSample, [record for record in records if isinstance(record, CeilingSample)]),
        cell_plans=[record for record in records if isinstance(record, CellPlan)],
        texts=[record for record in records if isinstance(record, Text)],
        starts=starts,
    )


def _doubtful(columns: Mapping[str, Column]) -> bool:
    """Return whether `refuse_impossible` may refuse one of these turns: a look at all of them at once."""
    amounts = [columns[name] for name in ("prefill_ns", "prefill_event_ns", "amount") if name in columns]
    lists = {name: column for name, column in columns.items() if isinstance(column, Lists)}
    if any(((column <= 0) & (column != NONE)).any() for column in amounts if isinstance(column, np.ndarray)):
        return True
    if any((column.flat <= 0).any() for column in lists.values()):
        return True
    steps = columns.get("steps")
    if not isinstance(steps, Coded):
        return bool((lists["pass_ns"].lengths < 1).any())
    wanted = np.array([len(value) for value in steps.distinct], dtype=np.int64)[steps.codes]
    events = lists["step_event_ns"].lengths
    return bool((lists["step_ns"].lengths != wanted).any() or ((events != wanted) & (events >= 0)).any())
