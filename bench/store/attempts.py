"""Which records of a cluster run count, where a job was started more than once.

A cell is measured on one machine: by one attempt of its job, or by several that continue each other there. Where a node
dies, the job is measured again, perhaps on another one, and what the first attempt holds of a torn cell must neither be
paired with the second's rounds nor be counted beside them.
"""

from collections.abc import Collection, Mapping, Sequence

import msgspec

from bench.analysis.rounds import Rounds, planned_rounds
from bench.errors import DataError
from bench.manifest import CasePlan, Manifest
from bench.record import CeilingSample, CellPlan, Failure, JobStart, Record, Run, Sample, Text
from bench.store.samples_files import SamplesFile, planned, subject


def counted(files: Sequence[SamplesFile], manifest: Manifest) -> tuple[list[Record], dict[str, JobStart]]:
    """Return the records that count, and which attempt measured each cell (`Run.starts`).

    Of each cell the best attempt counts (see `_worth`), with those that it continues; of equal ones the first. The
    texts of all attempts count: they are no times. A run without jobs has no attempts, and all of its records count.

    Raises:
        DataError: an attempt is missing that another continues, or a file belongs to no job.
    """
    starts = {file.start.attempt: file.start for file in files if file.start is not None}
    if not starts:
        return [record for file in files for record in file.records], {}
    cells = planned(manifest)
    by_cell: dict[str, dict[str, list[Record]]] = {}
    for file in files:
        if file.start is None:
            if file.records:
                raise DataError(f"{file.path}: holds records of no job, although the run has jobs")
            continue
        if not starts.keys() >= set(file.start.continues):
            raise DataError(f"{file.path}: continues an earlier samples file of {file.start.job}, which is missing")
        for record in file.records[1:]:
            by_cell.setdefault(cells[subject(record)], {}).setdefault(file.start.attempt, []).append(record)
    items: dict[str, list[CasePlan]] = {}
    for item in manifest.plan:
        items.setdefault(item.case.cell.key, []).append(item)
    best = {
        cell: _best(own, starts, msgspec.structs.replace(manifest, plan=items[cell])) for cell, own in by_cell.items()
    }
    counting = {id(record) for _, records in best.values() for record in records}
    everything = (record for file in files for record in file.records[1:])
    records = [record for record in everything if isinstance(record, Text) or id(record) in counting]
    return records, {cell: starts[name] for cell, (name, _) in best.items()}


def continued(starts: Mapping[str, JobStart]) -> list[str]:
    """Return the attempts whose records count, by the starts of the cells: those that the next attempt adds to."""
    return list(dict.fromkeys(name for start in starts.values() for name in (*start.continues, start.attempt)))


def _best(
    own: Mapping[str, list[Record]], starts: Mapping[str, JobStart], manifest: Manifest
) -> tuple[str, list[Record]]:
    """Return the attempt that counts for the one cell of `manifest`, and the cell's records that count with it.

    `own` are the cell's records by attempt. An attempt that continues several adds to the best of them alone: two that
    were started without knowing each other may hold the same rounds.
    """
    chains: dict[str, list[Record]] = {}

    def best(names: Collection[str]) -> str:
        return max(names, key=lambda name: _worth(chains[name], starts[name], manifest))

    for name in sorted(own, key=lambda name: len(starts[name].continues)):  # what it continues, continues fewer
        earlier = [other for other in starts[name].continues if other in chains]
        chains[name] = _joined(chains[best(earlier)] if earlier else [], own[name])
    name = best(own.keys())
    return name, chains[name]


def _joined(earlier: list[Record], later: list[Record]) -> list[Record]:
    """Add the records of a later attempt to earlier ones, but for rounds that were begun already."""
    begun = {_round(record) for record in earlier} - {None}
    return earlier + [record for record in later if _round(record) not in begun]


def _round(record: Record) -> tuple[int, int] | None:
    """Return process and number of the round that a record is a turn of; None for a warm-up, and what is no turn."""
    if not isinstance(record, Sample | CeilingSample) or record.warmup:
        return None
    return record.process, record.round


def _worth(records: Sequence[Record], start: JobStart, manifest: Manifest) -> tuple[bool, int]:
    """Return whether a cell's records are all that it needs, and how many of its rounds are whole and undisturbed.

    A case that failed, and not because its worker died, needs no rounds: that is its result.
    """
    plans = [record for record in records if isinstance(record, CellPlan)]
    repetitions = planned_rounds(plans[-1] if plans else None, manifest.repetitions)
    failures = [record for record in records if isinstance(record, Failure) and not record.worker_died]
    failed = {(failure.case, failure.process) for failure in failures}
    samples = [record for record in records if isinstance(record, Sample)]
    starts = {manifest.plan[0].case.cell.key: start}
    rounds = Rounds(Run(path="", manifest=manifest, samples=samples, checks=[], failures=failures, starts=starts))
    missing = whole = 0
    for process in range(manifest.processes):
        live = [item.case.key for item in manifest.plan if (item.case.key, process) not in failed]
        missing += rounds.missing(live, process, repetitions) if live else 0
        whole += rounds.count(live, process)[1] if live else repetitions
    return not missing, whole
