"""A run folder on disk: a manifest, and samples files that are only ever appended to. Nothing stored is written again.

A samples file consists of checked lines (checked_lines.py), the first of which continues the manifest's digest; each is
on the disk before the next turn starts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

import filelock
import msgspec

from bench.errors import DataError, UsageError
from bench.manifest import SCHEMA_VERSION, Manifest
from bench.record import CeilingSample, CellPlan, Check, Failure, Record, Run, Sample
from bench.store import checked_lines, sealed

NAME = re.compile(r"[A-Za-z0-9._-]+")
LONGEST_NAME = 200
"""File systems take 255 bytes for a name, and a run's begins with its time."""
LOCK = ".lock"

RecordKind = Literal["run", "ab"]
_MANIFESTS: dict[RecordKind, str] = {"run": "manifest.json", "ab": "ab.json"}

_decode_record = msgspec.json.Decoder(Record | checked_lines.Closing).decode


def check_name(name: str) -> str:
    """Return `name` if it can be a run's or a baseline's name.

    Raises:
        UsageError: it has other characters than letters, digits, '.', '_' and '-', is '.' or '..', or is too long.
    """
    if not NAME.fullmatch(name) or name in (".", ".."):
        raise UsageError(f"--name {name!r}: a name has only letters, digits, '.', '_' and '-', as in 'laptop-2'")
    if len(name) > LONGEST_NAME:
        raise UsageError(f"--name: {len(name)} characters, at most {LONGEST_NAME} are valid")
    return name


class RunWriter:
    """Appends records to one samples file of its own in a run folder.

    Use as a context manager: a normal end writes the closing line, an exception leaves the file open-ended (resumable).

    Raises:
        OSError: the disk is full or the folder cannot be written (from `append`; earlier records are safe).
    """

    def __init__(self, folder: Path, digest: str) -> None:
        self.folder = folder
        self._lines = checked_lines.Appender(_new_samples_file(folder), digest)

    def append(self, record: Record) -> None:
        """Write `record` and wait until it is on the disk."""
        self._lines.append(record)

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._lines.close(finished=kind is None)


def make_folder(out: Path, run_id: str) -> Path:
    """Make the folder `out/<run_id>`, still without a manifest.

    Raises:
        UsageError: the folder exists already, or cannot be made.
    """
    folder = out / run_id
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be made ({error.strerror})") from error
    try:
        folder.mkdir()
    except FileExistsError as error:
        raise UsageError(f"--out: {error.filename} exists already; choose another --name, or --resume it") from error
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be written ({error.strerror})") from error
    return folder


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write a new run folder's manifest; return it with its digest.

    Raises:
        UsageError: the folder cannot be written.
    """
    manifest = sealed.sealed(manifest)
    try:
        sealed.write(folder / _MANIFESTS["run"], manifest)
    except OSError as error:
        raise UsageError(f"--out: {folder} cannot be written ({error.strerror})") from error
    return manifest


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Reserve a run folder for one measuring process; the kernel frees it when the process ends, however it ends.

    Raises:
        UsageError: another process measures into it, or it cannot be written.
    """
    lock = filelock.FileLock(folder / LOCK, blocking=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UsageError(f"{folder}: another process measures into it; wait until it ends") from None
    except OSError as error:
        raise UsageError(f"--out: {folder} cannot be written ({error.strerror})") from error
    try:
        yield
    finally:
        # Removed while it is still held: who opened it before finds it without a name and starts over (filelock looks).
        (folder / LOCK).unlink(missing_ok=True)
        lock.release()


def read_run(folder: Path) -> Run:
    """Read a run folder back, every record checked.

    Raises:
        DataError: it is missing, damaged (the file and line are named), or of a newer schema.
    """
    manifest = sealed.read(folder / _MANIFESTS["run"], Manifest, SCHEMA_VERSION)
    samples: list[Sample] = []
    checks: list[Check] = []
    failures: list[Failure] = []
    ceilings: list[CeilingSample] = []
    cell_plans: list[CellPlan] = []
    paths = sorted(folder.glob("samples*.jsonl"), key=_file_number)
    if [_file_number(path) for path in paths] != list(range(1, len(paths) + 1)):
        raise DataError(f"{folder}: a samples file is missing (there are {', '.join(path.name for path in paths)})")
    planned = {key for item in manifest.plan for key in (item.case.key, item.case.cell.key)}
    for path in paths:
        for record in _records(path, manifest.digest):
            subject = record.cell if isinstance(record, CeilingSample | CellPlan) else record.case
            if subject not in planned:
                raise DataError(f"{path}: holds a case that the manifest does not plan: {subject}")
            match record:
                case Sample():
                    samples.append(record)
                case Check():
                    checks.append(record)
                case Failure():
                    failures.append(record)
                case CeilingSample():
                    ceilings.append(record)
                case CellPlan():
                    cell_plans.append(record)
    return Run(
        path=str(folder),
        manifest=manifest,
        samples=samples,
        checks=checks,
        failures=failures,
        ceilings=ceilings,
        cell_plans=cell_plans,
    )


def find(run: str, out: Path) -> tuple[Path, RecordKind]:
    """Find the folder that `run` means, a path or a bare name under `out`, and whether it holds a run or an A/B.

    Raises:
        DataError: there is no such folder, or it holds neither.
    """
    places = [Path(run), *([out / run] if run == Path(run).name else [])]
    for folder in places:
        for kind, manifest in _MANIFESTS.items():
            try:
                if (folder / manifest).is_file():
                    return folder, kind
            except PermissionError as error:
                raise DataError(f"{folder}: cannot be read ({error.strerror})") from error
    stored = (path for manifest in _MANIFESTS.values() for path in out.glob(f"*/{manifest}"))
    known = sorted((path.parent.name for path in stored), reverse=True)
    hint = f"the latest there are {', '.join(known[:3])}" if known else "there is none yet: `kvbench run` makes one"
    looked_for = f"{' or '.join(_MANIFESTS.values())} in {' and '.join(map(str, places))}"
    raise DataError(f"{run}: no run folder (looked for {looked_for}); {hint}")


def find_run(run: str, out: Path) -> Path:
    """Find the folder of the run that `run` means; raises as `find`, and where it is an A/B's."""
    folder, kind = find(run, out)
    if kind == "ab":
        raise DataError(f"{folder}: the record of an A/B, no run; `kvbench report {folder}` shows its verdicts")
    return folder


def _new_samples_file(folder: Path) -> BinaryIO:
    """Create the next free of samples.jsonl, samples-2.jsonl, ...: two writers never share a file."""
    number = 1
    while True:
        name = "samples.jsonl" if number == 1 else f"samples-{number}.jsonl"
        try:
            return (folder / name).open("xb")
        except FileExistsError:
            number += 1
        except OSError as error:
            raise UsageError(f"--out: {folder} cannot be written ({error.strerror})") from error


def _file_number(path: Path) -> int:
    number = path.stem.removeprefix("samples").removeprefix("-")
    if number and not number.isdigit():
        raise DataError(f"{path}: not a samples file of a run")
    return int(number or 1)


def _records(path: Path, digest: str) -> list[Record]:
    """Read the records of one samples file."""
    try:
        found = checked_lines.read(path, digest, _decode_record)
    except checked_lines.Damaged as error:
        raise DataError(str(error)) from error
    for number, record in enumerate(found.records, start=1):
        _refuse_impossible(record, path, number)
    return found.records


def _refuse_impossible(record: Record, path: Path, number: int) -> None:
    """Refuse times and amounts that are zero or negative: such were never measured."""
    if isinstance(record, Sample):
        events = record.step_event_ns if record.step_event_ns is not None else record.step_ns
        times = [record.prefill_ns, record.prefill_event_ns or 1, *record.step_ns, *events]
        if min(times) <= 0 or not len(record.step_ns) == len(events) == len(record.steps):
            raise DataError(f"{path}, line {number}: a time is not positive, or a step has none")
    elif isinstance(record, CeilingSample) and min([record.amount, *(record.pass_ns or [0])]) <= 0:
        raise DataError(f"{path}, line {number}: a ceiling's amount or a time of it is not positive")
