"""Merges what jobs wrote elsewhere into the folders of their runs."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bench.errors import DataError
from bench.manifest import Manifest
from bench.store import samples_files
from bench.store.run_folder import find_run, read_manifest, writing
from bench.store.run_records import SamplesFile, read_files, read_one
from kvcache.files import write_atomically


class Collected(NamedTuple):
    """What became of one samples file."""

    source: Path
    target: Path | None
    """None: the file holds nothing yet, since its job was killed before its first record."""
    is_new: bool
    """False: its content lay there already, or there is none."""


def collect(folder: Path, out: Path) -> Iterator[Collected]:
    """Copy the samples files of jobs in `folder` into the folders of their runs below `out`.

    A file that lies there is not copied again; one that grew since takes the place of what was copied. Attempts of the
    same job on several machines lie side by side, and readers count each cell once.

    Raises:
        DataError: the folder holds no samples of a job, a file is damaged, or its run is not below `out`.
        UsageError: the run folder cannot be written.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    paths = [path for path in sorted(folder.glob("samples-job-*.jsonl")) if samples_files.NAME.fullmatch(path.name)]
    if not paths:
        raise DataError(f"{folder}: holds no samples of a job (samples-job-*.jsonl)")
    for path in paths:
        start = samples_files.begin(path)
        if start is None:
            yield Collected(path, None, is_new=False)
            continue
        # Under --out, never a folder of that name here, which may be what is collected.
        target = find_run(str(out / start.run_id), out)
        manifest = read_manifest(target)
        yield _copy(read_one(path, manifest), target, manifest)


def _copy(file: SamplesFile, target: Path, manifest: Manifest) -> Collected:
    assert file.start is not None
    content = file.path.read_bytes()
    for other in read_files(target, manifest, file.start.job):
        if other.start is not None and other.start.attempt == file.start.attempt:
            if other.path.read_bytes().startswith(content):
                return Collected(file.path, other.path, is_new=False)
            with writing(f"--out {target}"):
                write_atomically(other.path, content)
            return Collected(file.path, other.path, is_new=True)
    with writing(f"--out {target}"), samples_files.next_free(target, file.start.job) as copy:
        copy.write(content)
    return Collected(file.path, Path(copy.name), is_new=True)
