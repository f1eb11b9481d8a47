"""A cluster run made by hand: a manifest with two groups of two cells, its job files, and jobs that write samples."""

from pathlib import Path

import msgspec

from bench.manifest import Cluster, Environment, Manifest
from bench.record import CeilingSample, JobStart, Run
from bench.store import job_files
from bench.store.run_folder import make_folder, samples_file, write_manifest
from tests.handmade import ENVIRONMENT, QUIET, grid, make_run, steady_roofs

ROUNDS = 3
CASES = [*grid(["naive", "dynamic"], [8, 16], n_gen=4), *grid(["naive", "dynamic"], [8, 16], n_gen=4, n_threads=1)]
"""Two groups, by their threads: job-0 and job-1."""


def make_cluster_run(out: Path) -> tuple[Path, Manifest]:
    """Write the folder of a cluster run that nothing was measured of yet."""
    planned = make_run(CASES, rounds=ROUNDS).manifest
    folder = make_folder(out, planned.run_id)
    manifest = write_manifest(folder, msgspec.structs.replace(planned, cluster=Cluster(kind="local")))
    job_files.read_or_write(folder, manifest, ceilings=False)
    return folder, manifest


def node(name: str, **fields: object) -> Environment:
    """Return the environment of a node of the cluster."""
    return msgspec.structs.replace(ENVIRONMENT, hostname=name, **fields)


def write_attempt(
    folder: Path,
    machine: Environment,
    attempt: str,
    *,
    job: int = 0,
    rounds: int = ROUNDS,
    first: int = 0,
    cells: tuple[int, ...] = (8, 16),
    continues: tuple[str, ...] = (),
    into: Path | None = None,
    steal_ns: int = 0,
) -> Run:
    """Write what an attempt of a job measured, rounds `first` to `rounds` of the prompts `cells`; return it as a run.

    The times depend on the attempt, so that it can be seen whose are read. `into` is another folder to write into;
    `steal_ns` was stolen from every turn.
    """
    file, _ = job_files.read(job_files.path_of(folder, f"job-{job}"))
    cases = [item.case for item in file.manifest.plan if item.case.n_prompt in cells]
    disturbed = msgspec.structs.replace(QUIET, steal_ns=steal_ns)
    seed = len(attempt) + ord(attempt[0])
    run = make_run(cases, rounds=rounds, seed=seed, roofs=steady_roofs, covariates=lambda case, number: disturbed)
    start = JobStart(
        run_id=file.manifest.run_id,
        job=file.job,
        attempt=attempt,
        continues=list(continues),
        environment=machine,
    )
    with samples_file(into or folder, file.manifest.digest, file.job) as writer:
        for record in [start, *run.checks, *run.samples, *run.ceilings]:
            if not isinstance(record, CeilingSample) and getattr(record, "round", first) < first:
                continue
            writer.append(record)
    return run
