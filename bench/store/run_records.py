"""The records of a run, read from its samples files and checked: turns into columns, the others as they are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.errors import DataError
from bench.manifest import Manifest
from bench.record import CeilingSample, CellPlan, Check, Failure, JobStart, Record, Run, Sample, Text
from bench.store import checked_lines, samples_files
from bench.store.checked_lines import Closing, Part
from bench.store.in_processes import mapped
from bench.turns import NONE, Coded, Column, Lists, Turns


class Records(NamedTuple):
    """Some records of a run: turns in columns, the others in the order of writing."""

    samples: Turns[Sample]
    ceilings: Turns[CeilingSample]
    others: list[Record]
    """Checks, failures, plans of cells and texts."""

    @classmethod
    def joined(cls, parts: Sequence[Records]) -> Records:
        """Join records, in their order."""
        samples, ceilings = [part.samples for part in parts], [part.ceilings for part in parts]
        others = [record for part in parts for record in part.others]
        return cls(Turns.joined(Sample, samples), Turns.joined(CeilingSample, ceilings), others)

    @property
    def is_empty(self) -> bool:
        """Whether there is no record."""
        return not (len(self.samples) or len(self.ceilings) or self.others)

    def about(self, wanted: Callable[[str], bool]) -> Records:
        """Return the records about cases and cells whose keys are wanted."""
        kept = []
        for coded in (self.samples.coded("case"), self.ceilings.coded("cell")):
            is_wanted = np.array([wanted(key) for key in coded.distinct], dtype=np.bool_)
            kept.append(np.flatnonzero(is_wanted[coded.codes]))
        others = [record for record in self.others if wanted(samples_files.subject(record))]
        return Records(self.samples.at(kept[0]), self.ceilings.at(kept[1]), others)


class SamplesFile(NamedTuple):
    """What one samples file holds."""

    path: Path
    start: JobStart | None
    """The start of the job's attempt; None in a run without jobs, and where the attempt ended before it."""
    records: Records
    """The others."""


def read_files(folder: Path, manifest: Manifest, job: str | None = None) -> list[SamplesFile]:
    """Read the samples files of a folder (or those of one job), in the order in which they were begun, each checked.

    Raises:
        DataError: one is missing or damaged (the file and line are named), or holds what the manifest does not plan.
    """
    return [read_one(file.path, manifest) for file in samples_files.listed(folder, job)]


def read_one(path: Path, manifest: Manifest) -> SamplesFile:
    """Read and check one samples file; a large one is read by several processes.

    Raises:
        DataError: it is damaged, or holds a case that is not planned, or a time that was never measured.
    """
    keys = frozenset(samples_files.planned(manifest))
    try:
        parts = list(mapped(partial(_sorted, keys), checked_lines.parts(path, manifest.digest)))
    except EOFError as error:
        what = "a process that read it was killed; there may be too little memory"
        raise DataError(f"{path}: {what}") from error
    start, job = parts[0].start, samples_files.job_of(path)
    records = Records.joined([part.records for part in parts])
    is_odd = job != (None if start is None else start.job) or any(part.start is not None for part in parts[1:])
    if is_odd and not (start is None and records.is_empty):
        raise DataError(f"{path}: does not begin as a samples file of {job or 'a run without jobs'}")
    return SamplesFile(path, start, records)


class _Sorted(NamedTuple):
    """The records of a part of a file."""

    start: JobStart | None
    records: Records


def _sorted(planned: Collection[str], part: Part) -> _Sorted:
    """Read a part of a file, check its records and sort them."""
    path = part.path
    kinds: dict[type, list[Any]] = {Sample: [], CeilingSample: []}
    lines = part.records(samples_files.decode_record)
    for line in lines:
        kinds.setdefault(type(line), []).append(line)
    records: list[Any] = lines[:-1] if kinds.pop(Closing, None) else lines
    start = records[0] if records and isinstance(records[0], JobStart) else None
    others = [record for record in records if not isinstance(record, Sample | CeilingSample) and record is not start]
    if any(isinstance(record, JobStart) for record in others):
        raise DataError(f"{path}: holds the start of a job behind other records")
    subjects = {*(one.case for one in kinds[Sample]), *(one.cell for one in kinds[CeilingSample])}
    unplanned = subjects.union(map(samples_files.subject, others)) - frozenset(planned)
    if unplanned:
        raise DataError(f"{path}: holds a case that the manifest does not plan: {min(unplanned)}")
    try:
        samples, ceilings = Turns.of(Sample, kinds[Sample]), Turns.of(CeilingSample, kinds[CeilingSample])
    except OverflowError as error:
        where = f"{path}, line {part.lines_before() + 1} or later"
        raise DataError(f"{where}: a number has more than 64 bits") from error
    if _doubtful(samples.columns) or _doubtful(ceilings.columns):
        for number, record in enumerate(records, start=part.lines_before() + 1):
            samples_files.refuse_impossible(record, path, number)
    return _Sorted(start, Records(samples, ceilings, others))


def run_of(folder: Path, manifest: Manifest, records: Records, starts: dict[str, JobStart]) -> Run:
    """Make a run of the records of its samples files that count, and of the starts of its jobs."""
    return Run(
        path=str(folder),
        manifest=manifest,
        samples=records.samples,
        checks=[record for record in records.others if isinstance(record, Check)],
        failures=[record for record in records.others if isinstance(record, Failure)],
        ceilings=records.ceilings,
        cell_plans=[record for record in records.others if isinstance(record, CellPlan)],
        texts=[record for record in records.others if isinstance(record, Text)],
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
