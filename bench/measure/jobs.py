"""One job of a cluster run, measured where it is started: the same way as a run on one machine, into a file of its own.

A job that is started again (its node died, it ran out of time) measures only what it lacks, and adds rounds to a torn
cell only on the machine that measured the others.
"""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from bench.analysis.tidy import outcomes
from bench.errors import DataError, FailedRun, UsageError
from bench.machine.affinity import allowed_cores, notice, user_variables
from bench.machine.devices import DEVICES
from bench.machine.environment import read_environment
from bench.manifest import Manifest
from bench.measure.plan import Limits
from bench.measure.progress import ProgressBar
from bench.measure.resume import pending_cells
from bench.measure.run import measure_ceilings, noting, refuse_too_large
from bench.measure.schedule import measure as measure_cases
from bench.measure.server_process import RunServers
from bench.record import FAULTS, JobStart, Record, Run, Text
from bench.store import job_files, samples_files
from bench.store.attempts import continued, counted
from bench.store.job_files import JobFile
from bench.store.run_folder import locked, read_manifest, samples_file
from bench.store.run_records import Records, SamplesFile, read_files, run_of
from kvcache import models


def measure_job(path: Path, servers: RunServers, say: Callable[[str], None]) -> Run:
    """Measure what the job of a file lacks, in workers that `servers` fork, and return its part of the run.

    `say` gets lines for the user.

    Raises:
        DataError: the file is damaged, of a newer schema, or does not belong to the run folder; or the weights of its
            model are others here.
        UsageError: it would write outside of its run folder, this machine cannot run it, or another process does.
        FailedRun: the samples were lost: the folder is gone.
    """
    job, folder = job_files.read(path)
    manifest, group = job.manifest, job.manifest.plan[0].case.group
    servers.start(group.model, group.n_threads)  # it imports torch while this process does
    _refuse_unfit(job, path, folder)
    environment = read_environment()
    about_threads = notice({group.n_threads}, user_variables())
    if about_threads is not None:
        say(f"kvbench: {about_threads}")
    kept = f"what was measured is kept, go on with: kvbench run --resume {folder}"
    with locked(folder, job.job), noting(kept):
        files = read_files(folder, manifest, job.job)
        mine = [file for file in files if file.start and file.start.environment.machine == environment.machine]
        previous, continues = _previous(folder, manifest, files, mine)
        if not pending_cells(manifest.plan, Limits.of(manifest), previous):
            say(f"{job.job} is measured already")
            return previous
        ceilings = measure_ceilings(manifest.plan, servers) if job.ceilings else {}
        start = JobStart(
            run_id=manifest.run_id,
            job=job.job,
            attempt=secrets.token_hex(8),
            continues=continues,
            environment=environment,
            ceilings=ceilings,
        )
        with samples_file(folder, manifest.digest, job.job) as writer:
            writer.append(start)
            limits = replace(Limits.of(manifest), ceilings=bool(ceilings))
            with ProgressBar(f"{job.job} of {manifest.run_id}", f"{job.job} measured in") as progress:
                plan, text, kernels = manifest.plan, manifest.text, manifest.kernels
                measure_cases(plan, limits, writer, progress, servers.fork, previous, text, kernels)
        return _stored(folder, manifest, start)


def unfinished(folder: Path, jobs: Sequence[JobFile]) -> list[JobFile]:
    """Return the jobs whose samples in the run folder are not all that they should be. Raises DataError."""
    return [job for job in jobs if _pending(_counted(folder, job.manifest, job.job))]


def has_failed(run: Run) -> bool:
    """Return whether a case of a job failed: exit code 5. One whose dead worker was replaced did not."""
    return any(ended.status in FAULTS for ended in outcomes(run).values())


def _counted(folder: Path, manifest: Manifest, job: str) -> Run:
    """Read what all machines have measured of a job."""
    return run_of(folder, manifest, *counted(read_files(folder, manifest, job), manifest))


def _pending(run: Run) -> set[str]:
    """Return the keys of the cells that lack rounds."""
    return {cell[0].case.cell.key for cell in pending_cells(run.manifest.plan, Limits.of(run.manifest), run)}


def _previous(
    folder: Path, manifest: Manifest, files: Sequence[SamplesFile], mine: Sequence[SamplesFile]
) -> tuple[Run, list[str]]:
    """Return what stands, and the attempts on this machine that the next one continues.

    What is complete stands, from any machine; of torn cells only what this machine measured.
    """
    (everywhere, starts), (here, own_starts) = counted(files, manifest), counted(mine, manifest)
    torn = _pending(run_of(folder, manifest, everywhere, starts))
    cells = samples_files.planned(manifest)

    def is_torn(key: str) -> bool:
        return cells[key] in torn

    stands, own = everywhere.about(lambda key: not is_torn(key)), here.about(is_torn)
    texts: list[Record] = [record for record in everywhere.others if isinstance(record, Text)]
    rest = [record for record in (*stands.others, *own.others) if not isinstance(record, Text)]
    records = Records.joined([stands, own])._replace(others=[*texts, *rest])
    complete = {cell: start for cell, start in starts.items() if cell not in torn}
    return run_of(folder, manifest, records, own_starts | complete), continued(own_starts)


def _refuse_unfit(job: JobFile, path: Path, folder: Path) -> None:
    """Refuse a job that does not belong here, or that this machine cannot run."""
    case, manifest = job.manifest.plan[0].case, folder / "manifest.json"
    if manifest.exists() and read_manifest(folder).digest != job.manifest.digest:
        raise DataError(f"{path}: is a job of the run {job.manifest.run_id}, but {folder} holds another one")
    reason = DEVICES[case.device].why_unusable()
    if reason is not None:
        raise UsageError(f"{path}: needs {case.device}: {reason}")
    if case.n_threads > allowed_cores():
        raise UsageError(f"{path}: needs {case.n_threads} threads, this process may use {allowed_cores()} cores")
    try:
        weights = models.weights_digest(case.model, seed=case.seed)
    except models.ModelError as error:
        raise UsageError(f"{path}: --model {case.model}: {error}") from error
    if weights != job.manifest.weights[case.model]:
        raise DataError(f"{path}: the weights of {case.model} are others here than where the run was planned")
    refuse_too_large(job.manifest.plan)


def _stored(folder: Path, manifest: Manifest, start: JobStart) -> Run:
    """Read the job back. Raises FailedRun if the file that was just written is not there."""
    files = read_files(folder, manifest, start.job)
    if not any(file.start == start for file in files):
        raise FailedRun(f"{folder}: gone while {start.job} was measured, and its samples with it")
    return run_of(folder, manifest, *counted(files, manifest))
