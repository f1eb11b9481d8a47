"""A run whose groups are measured by jobs: written, submitted, watched to its end, and resumed."""

import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from bench.errors import DataError, UsageError
from bench.manifest import Cluster
from bench.measure.cluster import Scheduler, SilentSchedulerError, scheduler
from bench.measure.jobs import unfinished
from bench.measure.progress import ProgressBar
from bench.measure.run import Job, noting
from bench.record import Run
from bench.store import job_files
from bench.store.job_files import JobFile
from bench.store.run_folder import find_run, locked, make_folder, read_manifest, read_run, write_manifest

SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
"""Between two questions to the scheduler: a twentieth of what the run has taken, within these."""


def stored_cluster(run: str, out: Path) -> Cluster | None:
    """Return how the jobs of a stored run are started; None where the run has none. Raises DataError."""
    return read_manifest(find_run(run, out)).cluster


def resume(run: str, out: Path, cluster: Cluster) -> Job:
    """Plan to go on with a run of jobs, started as `cluster` says from now on. Raises DataError."""
    previous = read_run(find_run(run, out))
    manifest = msgspec.structs.replace(previous.manifest, cluster=cluster)
    return Job(manifest, Path(previous.path).parent, previous)


def measure(job: Job, ask: Callable[[str], bool]) -> tuple[Run, list[str]]:
    """Have jobs measure what is missing; return the run as stored, and the jobs that did not finish.

    Ctrl-C asks by `ask` whether to cancel them.

    Raises:
        UsageError: the folder cannot be written, another command watches the run, or the scheduler refuses the jobs.
        DataError: the folder is gone or damaged.
    """
    assert job.manifest.cluster is not None
    folder, jobs = write_jobs(job)
    started = scheduler(folder, job.manifest.cluster)
    with locked(folder):
        missing = unfinished(folder, jobs)
        try:
            found = started.attach()
        except SilentSchedulerError as error:  # what still waits there must not be submitted twice
            raise UsageError(f"--cluster slurm: {error}") from None
        with _asking(started, folder, ask):
            try:
                with _held():
                    started.submit([one.job for one in missing if one.job not in found])
            except UsageError:
                if job.previous is None:
                    shutil.rmtree(folder)
                raise
            if missing:
                # What is complete may still wait for its end there: it is counted when it ends.
                _watch(folder, jobs, len({*found, *(one.job for one in missing)}), started)
    return read_run(folder), [one.job for one in unfinished(folder, jobs)]


def write_jobs(job: Job) -> tuple[Path, list[JobFile]]:
    """Write a new run's folder with its job files, or those that a resumed run lacks; return the folder and all jobs.

    Raises:
        UsageError: the folder cannot be written; nothing of a new one is left.
        DataError: a job file is damaged, or of a newer schema.
    """
    if job.previous is not None:
        ceilings = bool(job.previous.ceilings) or not job.previous.samples  # where no job file is left
        folder = Path(job.previous.path)
        return folder, job_files.read_or_write(folder, job.previous.manifest, ceilings=ceilings)
    folder = make_folder(job.out, job.manifest.run_id)
    try:
        return folder, job_files.read_or_write(folder, write_manifest(folder, job.manifest), ceilings=job.ceilings)
    except BaseException:  # Ctrl-C, too: no run has begun
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _watch(folder: Path, jobs: Sequence[JobFile], n_missing: int, started: Scheduler) -> None:
    """Wait until every job has ended; say how many are done, run, wait and have failed whenever that changes."""
    files = {one.job: one for one in jobs}
    outcome = {"done": len(jobs) - n_missing, "failed": 0}
    ended: set[str] = set()
    shown, silent, began = "", "", time.monotonic()
    with ProgressBar(f"{n_missing} of {len(jobs)} jobs to measure", "jobs ended after") as progress:
        progress.expect(n_missing)
        while True:
            try:
                states = started.states()
                silent = ""
            except SilentSchedulerError as error:
                if not silent:
                    progress.say(f"{error}; asking again")
                silent = str(error)
                time.sleep(_pause_s(began))
                continue
            new = [name for name, state in states.items() if state == "ended" and name not in ended]
            for name in new:
                ended.add(name)
                failed = _failed(folder, files[name])
                outcome["failed" if failed else "done"] += 1
                if failed:
                    progress.say(f"{name} failed: {started.reason(name)}")
            now = list(states.values())
            words = f"{outcome['done']} done, {now.count('running')} running, {now.count('waiting')} waiting"
            words += f", {outcome['failed']} failed"
            if words != shown:
                progress.begin(words, len(new))
                progress.advance(len(new))
                shown = words
            if len(ended) == len(states):
                return
            time.sleep(_pause_s(began))


def _pause_s(began: float) -> float:
    return min(LONGEST_PAUSE_S, max(SHORTEST_PAUSE_S, (time.monotonic() - began) / 20))


def _failed(folder: Path, job: JobFile) -> bool:
    """Return whether a job that ended lacks rounds."""
    with suppress(OSError):
        folder.chmod(folder.stat().st_mode)  # has NFS look at the folder anew
    return bool(unfinished(folder, [job]))


@contextmanager
def _held() -> Iterator[None]:
    """Hold signals back, from this process and from those that it starts: an array that Slurm took is recorded."""
    came: list[int] = []
    held = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU]  # whatever ends a command in order
    # A mask holds for this thread alone: a signal that another takes comes to these.
    handlers = [signal.signal(each, lambda number, _: came.append(number)) for each in held]
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, held)  # what sbatch inherits
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)  # what was pending comes now
        for each, handler in zip(held, handlers, strict=True):
            signal.signal(each, handler)
        for number in dict.fromkeys(came):
            signal.raise_signal(number)


@contextmanager
def _asking(started: Scheduler, folder: Path, ask: Callable[[str], bool]) -> Iterator[None]:
    """Let Ctrl-C ask whether to cancel the jobs; whatever ends the command early notes what becomes of them."""
    go_on = f"what was measured is kept, go on with: kvbench run --resume {folder}"
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        wanted = ask("cancel the jobs that have not ended?")
        if wanted:
            started.cancel()
        signal.signal(signal.SIGINT, handler)
        with noting(f"{'the jobs are cancelled' if wanted else started.left_alone()}; {go_on}"):
            signal.raise_signal(signal.SIGINT)
        raise
    except (DataError, UsageError):
        raise
    except BaseException as error:
        error.add_note(f"{started.left_alone()}; {go_on}")
        raise
    finally:
        signal.signal(signal.SIGINT, handler)
