"""A run folder on disk: a manifest, and samples files that are only ever appended to. Nothing stored is written again.

A samples file (samples_files.py) consists of checked lines, the first of which continues the manifest's digest; each is
on the disk before the next turn starts.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import filelock

from bench.errors import DataError, UsageError
from bench.manifest import SCHEMA_VERSION, Manifest
from bench.record import Run
from bench.store import checked_lines, samples_files, sealed
from bench.store.attempts import counted
from bench.store.derived import Derived
from bench.store.run_records import read_files, run_of

NAME = re.compile(r"[A-Za-z0-9._-]+")
LONGEST_NAME = 200
"""File systems take 255 bytes for a name, and a run's begins with its time."""
LOCK = ".lock"

RecordKind = Literal["run", "ab"]
_MANIFESTS: dict[RecordKind, str] = {"run": "manifest.json", "ab": "ab.json"}


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

    Where `out` is new, it is hidden from git: the user's repository looks as it did before. Folders above it are not,
    since `results/baselines` beside `results/runs` is there to be committed.

    Raises:
        UsageError: the folder exists already, or cannot be made.
    """
    folder = out / run_id
    with writing(f"--out {out}"):
        if folder.exists():
            raise UsageError(f"--out: {folder} exists already; choose another --name, or --resume it")
        is_new = not out.exists()
        folder.mkdir(parents=True)
    if is_new:
        derived = Derived()
        with derived.trying(f"{out}/.gitignore"):
            (out / ".gitignore").write_text("*\n", encoding="ascii")
        for line in derived.lines():
            sys.stderr.write(f"{line}\n")
    return folder


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write a new run folder's manifest; return it with its digest.

    Raises:
        UsageError: the folder cannot be written.
    """
    with writing(f"--out {folder}"):
        return sealed.write(folder / _MANIFESTS["run"], manifest)


def samples_file(folder: Path, digest: str, job: str | None = None) -> checked_lines.Appender:
    """Create the next free samples file of a run, or of one of its jobs, beside the manifest whose digest it continues.

    Raises:
        UsageError: the folder cannot be written.
    """
    with writing(f"--out {folder}"):
        return checked_lines.Appender(samples_files.next_free(folder, job), digest)


@contextmanager
def locked(folder: Path, job: str | None = None) -> Iterator[None]:
    """Reserve a run folder, or one job in it, for one measuring process.

    The kernel frees it when the process ends, however it ends; on a shared file system its server does. Where files
    cannot be locked, filelock takes a file that names the holder instead.

    Raises:
        UsageError: another process measures into it, or it cannot be written.
    """
    path = folder / (f"{LOCK}-{job}" if job else LOCK)
    lock = filelock.FileLock(path, blocking=False)
    with writing(f"--out {folder}"):
        try:
            lock.acquire()
        except filelock.Timeout:  # an OSError, too
            what = f"{folder}: another process measures {job or 'into it'}; wait until it ends"
            if_gone = f" (if its node is gone, remove {path})" if job else ""
            raise UsageError(f"{what}{if_gone}") from None
    try:
        yield
    finally:
        # Removed while it is still held: who opened it before finds it without a name and starts over (filelock looks).
        with suppress(OSError):  # a shared folder may be gone
            path.unlink()
        lock.release()


def read_manifest(folder: Path) -> Manifest:
    """Read a run's manifest. Raises DataError."""
    return sealed.read(folder / _MANIFESTS["run"], Manifest, SCHEMA_VERSION)


def read_run(folder: Path) -> Run:
    """Read a run folder back, every record checked.

    Raises:
        DataError: it is missing, damaged (the file and line are named), or of a newer schema.
    """
    manifest = read_manifest(folder)
    return run_of(folder, manifest, *counted(read_files(folder, manifest), manifest))


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
