"""Which records of a cluster run count, where a job was started more than once.

A cell is measured on one machine: by one attempt of its job, or by several that continue each other there. Where a node
dies, the job is measured again, perhaps on another one, and what the first attempt holds of a torn cell must neither be
paired with the second's rounds nor be counted beside them.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from bench.analysis.rounds import Rounds, planned_rounds
from bench.errors import DataError
from bench.manifest import CasePlan, Manifest
from bench.record import JobStart, Text
from bench.store.run_records import Records, SamplesFile, run_of
from bench.store.samples_files import planned, subject
from bench.turns import Ints, Turns, alike


class _Part(NamedTuple):
    """Records of a cell in one file, by their places in it."""

    records: Records
    """All of the file."""
    samples: Ints
    ceilings: Ints
    others: list[int]

    def taken(self) -> Records:
        """Return the records at these places."""
        samples, ceilings, others = self.records
        return Records(samples.at(self.samples), ceilings.at(self.ceilings), [others[place] for place in self.others])


_Chain = list[_Part]
"""What counts together of a cell: an attempt's part, after those that it continues."""


def counted(files: Sequence[SamplesFile], manifest: Manifest) -> tuple[Records, dict[str, JobStart]]:
    """Return the records that count, and which attempt measured each cell (`Run.starts`).

    Of each cell the best attempt counts (see `_worth`), with those that it continues; of equal ones the first. The
    texts of all attempts count: they are no times. A run without jobs has no attempts, and all of its records count.

    Raises:
        DataError: an attempt is missing that another continues, or a file belongs to no job.
    """
    starts = {file.start.attempt: file.start for file in files if file.start is not None}
    if not starts:
        return Records.joined([file.records for file in files]), {}
    cells = planned(manifest)
    by_cell: dict[str, dict[str, _Part]] = {}
    for file in files:
        if file.start is None:
            if not file.records.is_empty:
                raise DataError(f"{file.path}: holds records of no job, although the run has jobs")
            continue
        if not starts.keys() >= set(file.start.continues):
            raise DataError(f"{file.path}: continues an earlier samples file of {file.start.job}, which is missing")
        for cell, part in _by_cell(file.records, cells).items():
            by_cell.setdefault(cell, {})[file.start.attempt] = part
    items: dict[str, list[CasePlan]] = {}
    for item in manifest.plan:
        items.setdefault(item.case.cell.key, []).append(item)
    best = {
        cell: _best(own, starts, msgspec.structs.replace(manifest, plan=items[cell])) for cell, own in by_cell.items()
    }
    parts = [part for _, chain in best.values() for part in chain]
    return Records.joined([_counting(file.records, parts) for file in files]), {
        cell: starts[name] for cell, (name, _) in best.items()
    }


def _by_cell(records: Records, cells: Mapping[str, str]) -> dict[str, _Part]:
    """Return the places of each cell's records in a file."""
    turns: tuple[dict[str, list[Ints]], ...] = ({}, {})
    for found, coded in zip(turns, (records.samples.coded("case"), records.ceilings.coded("cell")), strict=True):
        for places in alike(coded.codes):
            found.setdefault(cells[coded.distinct[coded.codes[places[0]]]], []).append(places)
    others: dict[str, list[int]] = {}
    for place, record in enumerate(records.others):
        others.setdefault(cells[subject(record)], []).append(place)
    samples, ceilings = turns
    return {
        cell: _Part(records, _rising(samples.get(cell, [])), _rising(ceilings.get(cell, [])), others.get(cell, []))
        for cell in dict.fromkeys((*samples, *ceilings, *others))
    }


def _rising(places: Sequence[Ints]) -> Ints:
    return np.sort(np.concatenate([np.zeros(0, dtype=np.int64), *places]))


def _counting(records: Records, parts: Sequence[_Part]) -> Records:
    """Return the records of a file that are in some of `parts`, and its texts, in their order."""
    own = [part for part in parts if part.records is records]
    others = {place for part in own for place in part.others}
    others |= {place for place, record in enumerate(records.others) if isinstance(record, Text)}
    ceilings = _rising([part.ceilings for part in own])
    return _Part(records, _rising([part.samples for part in own]), ceilings, sorted(others)).taken()


def continued(starts: Mapping[str, JobStart]) -> list[str]:
    """Return the attempts whose records count, by the starts of the cells: those that the next attempt adds to."""
    return list(dict.fromkeys(name for start in starts.values() for name in (*start.continues, start.attempt)))


def _best(own: Mapping[str, _Part], starts: Mapping[str, JobStart], manifest: Manifest) -> tuple[str, _Chain]:
    """Return the attempt that counts for the one cell of `manifest`, and the cell's records that count with it.

    `own` are the cell's records by attempt. An attempt that continues several adds to the best of them alone: two that
    were started without knowing each other may hold the same rounds.
    """
    chains: dict[str, _Chain] = {}

    def best(names: Collection[str]) -> str:
        if len(names) == 1:
            return next(iter(names))
        return max(names, key=lambda name: _worth(chains[name], starts[name], manifest))

    for name in sorted(own, key=lambda name: len(starts[name].continues)):  # what it continues, continues fewer
        earlier = [other for other in starts[name].continues if other in chains]
        chains[name] = _joined(chains[best(earlier)] if earlier else [], own[name])
    name = best(own.keys())
    return name, chains[name]


def _joined(earlier: _Chain, later: _Part) -> _Chain:
    """Add the records of a later attempt to earlier ones, but for rounds that were begun already."""
    begun = {one for part in earlier for turns in part.taken()[:2] for one in _rounds(turns)} - {None}
    samples, ceilings, _ = later.taken()
    if not begun:
        return [*earlier, later]
    new_samples, new_ceilings = (
        places[[one not in begun for one in _rounds(turns)]]
        for places, turns in ((later.samples, samples), (later.ceilings, ceilings))
    )
    return [*earlier, later._replace(samples=new_samples, ceilings=new_ceilings)]


def _rounds(turns: Turns[Any]) -> list[tuple[int, int] | None]:
    """Return process and number of the round that each turn is of; None for a warm-up."""
    columns = (turns.ints(name).tolist() for name in ("process", "round", "warmup"))
    return [None if warmup else (process, number) for process, number, warmup in zip(*columns, strict=True)]


def _worth(chain: _Chain, start: JobStart, manifest: Manifest) -> tuple[bool, int]:
    """Return whether a cell's records are all that it needs, and how many of its rounds are whole and undisturbed.

    A case that failed, and not because its worker died, needs no rounds: that is its result.
    """
    run = run_of(
        Path(), manifest, Records.joined([part.taken() for part in chain]), {manifest.plan[0].case.cell.key: start}
    )
    repetitions = planned_rounds(run.cell_plans[-1] if run.cell_plans else None, manifest.repetitions)
    failed = {(failure.case, failure.process) for failure in run.failures if not failure.worker_died}
    rounds = Rounds(run)
    missing = whole = 0
    for process in range(manifest.processes):
        live = [item.case.key for item in manifest.plan if (item.case.key, process) not in failed]
        missing += rounds.missing(live, process, repetitions) if live else 0
        whole += rounds.count(live, process)[1] if live else repetitions
    return not missing, whole
