"""The samples files of a run folder: their names, how they are created and begin, and what their records may be.

A run that one process measured has `samples.jsonl`, and one more for each time it was resumed. A job of a cluster run
has files of its own, `samples-job-3.jsonl`, `samples-job-3-2.jsonl`, ..., each begun by a `JobStart`.
"""

import re
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import msgspec

from bench.errors import DataError
from bench.manifest import Manifest
from bench.record import CeilingSample, CellPlan, JobStart, Record, Sample
from bench.store import checked_lines

NAME = re.compile(r"samples(?:-(?P<job>job-\d+))?(?:-(?P<number>\d+))?\.jsonl")

decode_record = msgspec.json.Decoder(Record | checked_lines.Closing).decode


class _FirstLine(msgspec.Struct):
    record: JobStart


class NamedFile(NamedTuple):
    """Which file it is, by its name."""

    job: str | None
    number: int
    """Of the job's files, or of the run's, from 1."""
    path: Path


def next_free(folder: Path, job: str | None = None) -> BinaryIO:
    """Create the next free samples file, of `job` or of the run; raises OSError where the folder cannot be written.

    Two writers never share a file, on a shared file system either.
    """
    number = 1
    while True:
        parts = ["samples", *([job] if job else []), *([str(number)] if number > 1 else [])]
        with suppress(FileExistsError):
            return (folder / f"{'-'.join(parts)}.jsonl").open("xb")
        number += 1


def begin(path: Path) -> JobStart | None:
    """Return the first record of a job's samples file; None where it was never finished.

    Raises:
        DataError: it cannot be read, or begins otherwise.
    """
    try:
        with path.open("rb") as file:
            first = file.readline()
        if not first.endswith(b"\n"):
            return None
        return msgspec.json.decode(first, type=_FirstLine).record
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataError(f"{path}, line 1: damaged, or not the start of a job ({error})") from error


def job_starts(folder: Path) -> list[JobStart]:
    """Return the starts of a run's jobs, in their order. Raises DataError."""
    return [start for file in listed(folder) if file.job and (start := begin(file.path)) is not None]


def job_of(path: Path) -> str | None:
    """Return the job that a samples file belongs to, by its name."""
    match = NAME.fullmatch(path.name)
    return match["job"] if match else None


def planned(manifest: Manifest) -> dict[str, str]:
    """Return the cell's key of each case and cell that records may be about, by its own key."""
    return {key: item.case.cell.key for item in manifest.plan for key in (item.case.key, item.case.cell.key)}


def listed(folder: Path, job: str | None = None) -> list[NamedFile]:
    """List the samples files of a folder (or those of one job), in the order in which they were begun.

    Raises:
        DataError: one is missing.
    """
    found: list[NamedFile] = []
    for path in folder.glob("samples*.jsonl"):
        match = NAME.fullmatch(path.name)
        if match is None:
            raise DataError(f"{path}: not a samples file of a run")
        if job is None or match["job"] == job:
            found.append(NamedFile(match["job"], int(match["number"] or 1), path))
    found.sort(key=lambda file: (_place(file.job), file.number))
    _refuse_gaps(found)
    return found


def subject(record: Record) -> str:
    """Return the key of the case or cell that a record is about; empty for the start of a job."""
    if isinstance(record, JobStart):
        return ""
    return record.cell if isinstance(record, CeilingSample | CellPlan) else record.case


def _refuse_gaps(found: list[NamedFile]) -> None:
    """Refuse a folder in which a file is missing before another of its job, or of the run."""
    numbers: dict[str | None, list[int]] = {}
    for job, number, _ in found:
        numbers.setdefault(job, []).append(number)
    for job, present in numbers.items():
        if present != list(range(1, len(present) + 1)):
            names = ", ".join(path.name for other, _, path in found if other == job)
            raise DataError(f"{found[0].path.parent}: a samples file is missing (there are {names})")


def _place(job: str | None) -> int:
    """Order jobs by their numbers, the files of a run without jobs first."""
    return -1 if job is None else int(job.removeprefix("job-"))


def refuse_impossible(record: Record, path: Path, number: int) -> None:
    """Refuse times and amounts that are zero or negative: such were never measured.

    Raises:
        DataError: one is; file and line are named.
    """
    if isinstance(record, Sample):
        events = record.step_event_ns if record.step_event_ns is not None else record.step_ns
        times = [record.prefill_ns, record.prefill_event_ns or 1, *record.step_ns, *events]
        if min(times) <= 0 or not len(record.step_ns) == len(events) == len(record.steps):
            raise DataError(f"{path}, line {number}: a time is not positive, or a step has none")
    elif isinstance(record, CeilingSample) and min([record.amount, *(record.pass_ns or [0])]) <= 0:
        raise DataError(f"{path}, line {number}: a ceiling's amount or a time of it is not positive")
