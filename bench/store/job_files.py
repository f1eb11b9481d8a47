"""The job files of a cluster run: one per group of its plan, each enough to measure that group anywhere.

They lie in the run folder's subfolder `jobs`. A job is a part of the run's manifest; its samples file continues the
digest of that manifest, so it can be merged into the run folder from wherever it was written.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from bench.case import Group
from bench.errors import DataError, UsageError
from bench.manifest import CasePlan, Manifest
from bench.store import sealed
from bench.store.run_folder import writing

JOB_VERSION = 1
FOLDER = "jobs"
_NAME = re.compile(r"job-\d+")


class JobFile(msgspec.Struct, frozen=True, kw_only=True):
    """`jobs/job-3.json`: what one job measures, and where it writes."""

    schema_version: int
    job: str
    run_folder: str = ".."
    """The run folder, seen from the folder of this file."""
    ceilings: bool
    """Whether the job measures the ceilings of its machine."""
    manifest: Manifest
    """The run's, with this group's cases alone; its digest is that of the whole."""
    digest: str = ""
    """SHA-256 of this file with an empty digest."""


def split(manifest: Manifest, *, ceilings: bool) -> list[JobFile]:
    """Return a job for each group of a run's plan, in the plan's order: job-0, job-1, ..."""
    jobs = []
    for number, plan in enumerate(by_group(manifest.plan)):
        group, text = plan[0].case.group, manifest.text
        own = msgspec.structs.replace(
            manifest,
            plan=plan,
            weights={group.model: manifest.weights[group.model]},
            text=text and msgspec.structs.replace(text, tokens=_only(text.tokens, group.model)),
        )
        jobs.append(JobFile(schema_version=JOB_VERSION, job=f"job-{number}", ceilings=ceilings, manifest=own))
    return jobs


def by_group(plan: Sequence[CasePlan]) -> list[list[CasePlan]]:
    """Return the cases of each job, in the plan's order."""
    groups: dict[Group, list[CasePlan]] = {}
    for item in plan:
        groups.setdefault(item.case.group, []).append(item)
    return list(groups.values())


def path_of(folder: Path, job: str) -> Path:
    """Return the path of a job's file in its run folder."""
    return folder / FOLDER / f"{job}.json"


def read(path: Path) -> tuple[JobFile, Path]:
    """Read and check a job file; return it and the run folder that it names.

    Raises:
        DataError: it is missing, damaged, of a newer schema, or plans nothing.
        UsageError: it names a folder outside of the run folder that it lies in.
    """
    job = sealed.read(path, JobFile, JOB_VERSION)
    if not job.manifest.plan:
        raise DataError(f"{path}: plans no case")
    here = path.resolve().parent
    folder = (here / job.run_folder).resolve()
    if folder not in (here, here.parent) or not _NAME.fullmatch(job.job):
        raise UsageError(f"{path}: {job.job} would be written to {folder}, outside of the run folder of this file")
    return job, folder


def read_or_write(folder: Path, manifest: Manifest, *, ceilings: bool) -> list[JobFile]:
    """Read the job files of a run folder, in their order; write those that are not there, as `split` makes them.

    Whether a written one measures `ceilings` is decided by those that are there, if any.

    Raises:
        UsageError: the folder cannot be written.
        DataError: one is damaged, or of a newer schema.
    """
    planned = split(manifest, ceilings=ceilings)
    there = {job.job: read(path)[0] for job in planned if (path := path_of(folder, job.job)).exists()}
    if there:
        planned = split(manifest, ceilings=next(iter(there.values())).ceilings)
    with writing(f"--out {folder}"):
        (folder / FOLDER).mkdir(exist_ok=True)
        for job in planned:
            if job.job not in there:
                sealed.write(path_of(folder, job.job), job)
    return [there.get(job.job, job) for job in planned]


def _only(tokens: dict[str, list[int]], model: str) -> dict[str, list[int]]:
    return {model: tokens[model]} if model in tokens else {}  # the text judges lossy strategies alone
