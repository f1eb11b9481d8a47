"""Which records of a cluster run count, where a job was started more than once.

A cell is measured on one machine: by one attempt of its job, or by several that continue each other there. Where a node
dies, the job is measured again, perhaps on another one, and what the first attempt holds of a torn cell must neither be
paired with the second's rounds nor be counted beside them.
"""

from collections.abc import Iterable, Sequence

from bench.errors import DataError
from bench.manifest import Manifest
from bench.record import CellPlan, Failure, JobStart, Record, Sample, Text
from bench.store.samples_files import SamplesFile, planned, subject


def counted(files: Sequence[SamplesFile], manifest: Manifest) -> tuple[list[Record], dict[str, JobStart]]:
    """Return the records that count, and which attempt measured each cell (`Run.starts`).

    Of each cell the attempt counts that holds most of it, with those that it continues; of equal ones the last. The
    texts of all attempts count: they are no times. A run without jobs has no attempts, and all of its records count.

    Raises:
        DataError: an attempt is missing that another continues, or a file belongs to no job.
    """
    attempts = {file.start.attempt: file for file in files if file.start is not None}
    if not attempts:
        return [record for file in files for record in file.records], {}
    for file in files:
        if file.job is None and file.records:
            raise DataError(f"{file.path}: holds records of no job, although the run has jobs")
    cells = planned(manifest)
    amounts = {name: _amounts(file.records, cells, manifest.repetitions) for name, file in attempts.items()}
    chains = {name: _chain(file, attempts) for name, file in attempts.items()}
    best: dict[str, tuple[int, str]] = {}
    for name in attempts:
        for cell in amounts[name]:
            amount = sum(amounts[other].get(cell, 0) for other in chains[name])
            if cell not in best or amount >= best[cell][0]:
                best[cell] = amount, name
    counting = {cell: chains[name] for cell, (_, name) in best.items()}
    records = [
        record
        for name, file in attempts.items()
        for record in file.records[1:]
        if isinstance(record, Text) or name in counting[cells[subject(record)]]
    ]
    starts = {name: file.start for name, file in attempts.items() if file.start is not None}
    return records, {cell: starts[name] for cell, (_, name) in best.items()}


def _amounts(records: Iterable[Record], cells: dict[str, str], repetitions: int) -> dict[str, int]:
    """Count the timed turns that each cell has in an attempt; a case that failed is as good as all of its turns."""
    amounts: dict[str, int] = {}
    for record in records:
        if isinstance(record, JobStart):
            continue
        cell = cells[subject(record)]
        amounts.setdefault(cell, 0)
        if isinstance(record, Sample):
            amounts[cell] += not record.warmup
        elif (isinstance(record, Failure) and not record.worker_died) or (
            isinstance(record, CellPlan) and record.left_out
        ):
            amounts[cell] += repetitions
    return amounts


def _chain(file: SamplesFile, attempts: dict[str, SamplesFile]) -> set[str]:
    """Return the attempts whose rounds `file` adds to, and itself."""
    assert file.start is not None
    for name in file.start.continues:
        if name not in attempts:
            raise DataError(f"{file.path}: continues an earlier samples file of {file.start.job}, which is missing")
    return {file.start.attempt, *file.start.continues}
