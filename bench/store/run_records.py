"""The records of a run, read from its samples files and checked: turns into columns, the others as they are."""

import itertools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from bench.errors import DataError
from bench.manifest import Manifest
from bench.record import CeilingSample, CellPlan, Check, Failure, JobStart, Record, Run, Sample, Text
from bench.store import checked_lines
from bench.store.samples_files import decode_record, refuse_impossible, subject
from bench.turns import NONE, Builder, Coded, Column, Lists, Turns

AT_ONCE = 4096
"""Records that are held as objects at a time."""


class Records:
    """Collects the records of a run; `planned` are the keys of its cases and cells."""

    def __init__(self, planned: Collection[str]) -> None:
        self._planned = planned
        self._samples, self._ceilings, self._others = Builder(Sample), Builder(CeilingSample), list[Record]()

    def read(self, path: Path, digest: str) -> None:
        """Add the records of a file whose first line continues `digest`.

        Raises:
            DataError: it is damaged, or holds a case that is not planned, or a time that was never measured.
        """
        lines = checked_lines.stream(path, digest, decode_record)
        for first in itertools.count(1, AT_ONCE):
            part = list(itertools.islice(lines, AT_ONCE))
            if not part:
                return
            records = [line for line in part if not isinstance(line, checked_lines.Closing)]  # the last, if any
            self._add(records, path, first)

    def run(self, folder: Path, manifest: Manifest) -> Run:
        """Return the run that the records are of."""
        others = run_of(folder, manifest, self._others, {})
        return msgspec.structs.replace(others, samples=self._samples.built(), ceilings=self._ceilings.built())

    def _add(self, records: Sequence[Record], path: Path, first: int) -> None:
        """Add records, the first of which stands on line `first`."""
        for record in records:
            if isinstance(record, JobStart):
                raise DataError(f"{path}: does not begin as a samples file of a run without jobs")
            if subject(record) not in self._planned:
                raise DataError(f"{path}: holds a case that the manifest does not plan: {subject(record)}")
        try:
            self._samples.add([record for record in records if isinstance(record, Sample)])
            self._ceilings.add([record for record in records if isinstance(record, CeilingSample)])
        except OverflowError as error:
            raise DataError(f"{path}, line {first} or later: a number has more than 64 bits") from error
        if _doubtful(self._samples.last) or _doubtful(self._ceilings.last):
            for number, record in enumerate(records, start=first):
                refuse_impossible(record, path, number)
        self._others += [record for record in records if not isinstance(record, Sample | CeilingSample)]


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
