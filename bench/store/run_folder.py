"""A run folder on disk: a manifest, and samples files that are only ever appended to. Nothing stored is written again.

A samples file consists of checked lines (checked_lines.py), the first of which continues the manifest's digest; each is
on the disk before the next turn starts.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import filelock
import msgspec

from bench.errors import DataError, UsageError
from bench.manifest import SCHEMA_VERSION, Manifest
from bench.record import CeilingSample, CellPlan, Check, Failure, Record, Run, Sample, Text
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


@contextmanager
def writing(where: str) -> Iterator[None]:
    """Turn a failure to write into a UsageError that begins with `where`, the flag and its folder."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{where}: cannot be written ({error.strerror})") from error


def make_folder(out: Path, run_id: str) -> Path:
    """Make the folder `out/<run_id>`, still without a manifest.

    Raises:
        UsageError: the folder exists already, or cannot be made.
    """
    folder = out / run_id
    if folder.exists():
        raise UsageError(f"--out: {folder} exists already; choose another --name, or --resume it")
    with writing(f"--out {out}"):
        folder.mkdir(parents=True)
    return folder


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write a new run folder's manifest; return it with its digest.

    Raises:
        UsageError: the folder cannot be written.
    """
    with writing(f"--out {folder}"):
        return sealed.write(folder / _MANIFESTS["run"], manifest)


def samples_file(folder: Path, digest: str) -> checked_lines.Appender:
    """Create the next free one of samples.jsonl, samples-2.jsonl, ... beside the manifest whose digest it continues.

    Two writers never share a file.

    Raises:
        UsageError: the folder cannot be written.
    """
    number = 1
    with writing(f"--out {folder}"):
        while True:
            with suppress(FileExistsError):
                file = (folder / ("samples.jsonl" if number == 1 else f"samples-{number}.jsonl")).open("xb")
                return checked_lines.Appender(file, digest)
            number += 1


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Reserve a run folder for one measuring process; the kernel frees it when the process ends, however it ends.

    Raises:
        UsageError: another process measures into it, or it cannot be written.
    """
    lock = filelock.FileLock(folder / LOCK, blocking=False)
    with writing(f"--out {folder}"):
        try:
            lock.acquire()
        except filelock.Timeout:  # an OSError, too
            raise UsageError(f"{folder}: another process measures into it; wait until it ends") from None
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
    paths = sorted(folder.glob("samples*.jsonl"), key=_file_number)
    if [_file_number(path) for path in paths] != list(range(1, len(paths) + 1)):
        raise DataError(f"{folder}: a samples file is missing (there are {', '.join(path.name for path in paths)})")
    planned = {key for item in manifest.plan for key in (item.case.key, item.case.cell.key)}
    records: list[Record] = []
    for path in paths:
        found = checked_lines.read(path, manifest.digest, _decode_record).records
        for number, record in enumerate(found, start=1):
            subject = record.cell if isinstance(record, CeilingSample | CellPlan) else record.case
            if subject not in planned:
                raise DataError(f"{path}: holds a case that the manifest does not plan: {subject}")
            _refuse_impossible(record, path, number)
        records += found
    return Run(
        path=str(folder),
        manifest=manifest,
        samples=[record for record in records if isinstance(record, Sample)],
        checks=[record for record in records if isinstance(record, Check)],
        failures=[record for record in records if isinstance(record, Failure)],
        ceilings=[record for record in records if isinstance(record, CeilingSample)],
        cell_plans=[record for record in records if isinstance(record, CellPlan)],
        texts=[record for record in records if isinstance(record, Text)],
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


def _file_number(path: Path) -> int:
    number = path.stem.removeprefix("samples").removeprefix("-")
    if number and not number.isdigit():
        raise DataError(f"{path}: not a samples file of a run")
    return int(number or 1)


def _refuse_impossible(record: Record, path: Path, number: int) -> None:
    """Refuse times and amounts that are zero or negative: such were never measured."""
    if isinstance(record, Sample):
        events = record.step_event_ns if record.step_event_ns is not None else record.step_ns
        times = [record.prefill_ns, record.prefill_event_ns or 1, *record.step_ns, *events]
        if min(times) <= 0 or not len(record.step_ns) == len(events) == len(record.steps):
            raise DataError(f"{path}, line {number}: a time is not positive, or a step has none")
    elif isinstance(record, CeilingSample) and min([record.amount, *(record.pass_ns or [0])]) <= 0:
        raise DataError(f"{path}, line {number}: a ceiling's amount or a time of it is not positive")
