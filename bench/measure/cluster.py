"""Starts the jobs of a cluster run by submitit, and says which of them wait, run or have ended.

Slurm, and one whole node for a job: neighbours on a node change its bandwidth, so a scheduler of logical resources does
not do. What a job measured is read from its samples, never from the scheduler, which forgets and requeues.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from bench.errors import UsageError
from bench.manifest import Cluster
from bench.store import job_files

if TYPE_CHECKING:
    from submitit.core.core import Job as Submitted

PROGRAM = [sys.executable, "-P", str(Path(__file__).resolve().parents[2] / "kvbench.py")]
"""What runs `job FILE` on a node: this very environment, on the shared file system."""

State = Literal["waiting", "running", "ended"]

LOGS = "logs"
SUBMITTED = "submitted.jsonl"
"""Which job has which number in Slurm, beside the job files: a line per submission."""

UNLIMITED_MIN = 1_000_000
"""submitit ends a local job after two minutes unless it is given more."""


class SilentSchedulerError(Exception):
    """The scheduler does not answer now; its jobs go on."""


def refuse_unavailable(kind: Literal["slurm", "local", "files"]) -> None:
    """Raise UsageError if jobs cannot be started here."""
    if kind == "files":
        return
    if importlib.util.find_spec("submitit") is None:
        raise UsageError(f"--cluster {kind} needs submitit: pip install 'kvbench[cluster]'")
    if kind == "slurm" and shutil.which("sbatch") is None:
        raise UsageError("--cluster slurm: there is no sbatch here; run this on a login node, or try --cluster local")


class Slurm:
    """Jobs in Slurm's queue: an array, each with a node of its own."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self._folder, self._cluster = folder, cluster
        self._ids: dict[str, str] = {}
        """Job -> its number in Slurm, as `1234_5`."""

    def attach(self) -> set[str]:
        """Find the jobs of the run that an earlier command started and that have not ended."""
        known: dict[str, str] = {}
        path = self._folder / job_files.FOLDER / SUBMITTED
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                with suppress(msgspec.DecodeError):  # torn by a kill: the job's own lock keeps it from running twice
                    known |= msgspec.json.decode(line, type=dict[str, str])
        queue = _queue() if known else {}
        self._ids = {job: number for job, number in known.items() if number in queue}
        return set(self._ids)

    def submit(self, jobs: Sequence[str]) -> None:
        """Start jobs, now or one after another. Raises UsageError where they are refused."""
        import submitit
        from submitit.core.utils import CommandFunction, FailedJobError

        if not jobs:
            return
        executor = submitit.SlurmExecutor(self._folder / job_files.FOLDER / LOGS)
        chosen = {"partition": self._cluster.partition, "constraint": self._cluster.constraint}
        commands = [CommandFunction(_command(self._folder, job)) for job in jobs]
        try:
            executor.update_parameters(
                job_name="kvbench",
                nodes=1,
                ntasks_per_node=1,
                exclusive=True,
                mem="0",  # all of the node's
                use_srun=False,  # a step of srun could be bound to one core
                time=self._cluster.time_min,
                array_parallelism=self._cluster.parallel or len(jobs),
                additional_parameters=self._cluster.options,
                **{name: value for name, value in chosen.items() if value is not None},
            )
            submitted = executor.submit_array(commands)
        except FailedJobError as error:
            raise UsageError(f"--cluster slurm: {' '.join(str(error).split())}") from None
        new = {job: each.job_id for job, each in zip(jobs, submitted, strict=True)}
        self._ids |= new  # first: where the line cannot be written, they can be named
        with (self._folder / job_files.FOLDER / SUBMITTED).open("ab") as file:
            file.write(b"\n" + msgspec.json.encode(new) + b"\n")  # the line before it may be torn

    def states(self) -> dict[str, State]:
        """Say where the jobs stand that were found or submitted. Raises SilentSchedulerError."""
        queue = _queue()
        return {job: queue.get(number, "ended") for job, number in self._ids.items()}

    def cancel(self) -> None:
        """End the jobs that have not ended; they keep what they measured."""
        subprocess.run(["scancel", *self._alive()], check=False)

    def left_alone(self) -> str:
        """Say what becomes of the jobs that have not ended when this process does."""
        return f"the jobs go on in Slurm (cancel them with: scancel {' '.join(self._alive())})"

    def reason(self, job: str) -> str:
        """Return why a job ended early, as far as it said."""
        import submitit

        number = self._ids[job]
        log = submitit.SlurmJob(self._folder / job_files.FOLDER / LOGS, number).paths.stderr
        return _last_words(log) or f"it left no log in {log.parent}; its node may have died"

    def _alive(self) -> list[str]:
        """List the numbers of the submissions that hold the jobs which have not ended, as far as Slurm answers."""
        queue: dict[str, State] = {}
        with suppress(SilentSchedulerError):
            queue = _queue()
        numbers = [number for number in self._ids.values() if number in queue] or list(self._ids.values())
        return list(dict.fromkeys(number.partition("_")[0] for number in numbers))


class Local:
    """Jobs on this machine, one after another: they would disturb each other. Its methods are those of `Slurm`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._left: list[str] = []
        self._started: dict[str, Submitted[str]] = {}

    def attach(self) -> set[str]:
        return set()  # one that still runs holds its job's lock

    def submit(self, jobs: Sequence[str]) -> None:
        self._left += jobs

    def states(self) -> dict[str, State]:
        states: dict[str, State] = {job: "ended" if one.done() else "running" for job, one in self._started.items()}
        if self._left and "running" not in states.values():
            self._start(self._left.pop(0))
            return self.states()
        return states | dict.fromkeys(self._left, "waiting")

    def cancel(self) -> None:
        import psutil

        self._left.clear()
        for one in self._started.values():
            if not one.done():
                with suppress(psutil.NoSuchProcess):  # it may end meanwhile
                    processes = psutil.Process(int(one.job_id)).children(recursive=True)
                    for process in processes:
                        with suppress(psutil.NoSuchProcess):
                            process.terminate()
                    psutil.wait_procs(processes, timeout=10)

    def left_alone(self) -> str:
        running = [job for job, one in self._started.items() if not one.done()]
        return f"{', '.join(running) or 'no job'} goes on, the jobs after it are not started"

    def reason(self, job: str) -> str:
        return _last_words(self._started[job].paths.stderr) or "it said nothing"

    def _start(self, job: str) -> None:
        import submitit
        from submitit.core.utils import CommandFunction

        executor = submitit.LocalExecutor(self._folder / job_files.FOLDER / LOGS)
        executor.update_parameters(timeout_min=UNLIMITED_MIN)
        # A session of its own keeps Ctrl-C from it; and submitit hides every GPU from a local job that asks for none.
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = ["-u", "CUDA_VISIBLE_DEVICES"] if visible is None else [f"CUDA_VISIBLE_DEVICES={visible}"]
        command = ["setsid", "env", *devices, *_command(self._folder, job)]
        self._started[job] = executor.submit(CommandFunction(command))


Scheduler = Slurm | Local


def scheduler(folder: Path, cluster: Cluster) -> Scheduler:
    """Return what starts the jobs of a run folder."""
    return Slurm(folder, cluster) if cluster.kind == "slurm" else Local(folder)


def _command(folder: Path, job: str) -> list[str]:
    return [*PROGRAM, "job", str(job_files.path_of(folder.resolve(), job))]


def _queue() -> dict[str, State]:
    """Ask Slurm for this user's jobs that have not ended, by number.

    Not `sacct`, on which submitit relies: it has no answer on a cluster without an accounting database.
    """
    command = ["squeue", "--noheader", "--array", "--format=%i %T", "--me"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except subprocess.TimeoutExpired:
        raise SilentSchedulerError("squeue did not answer within 60 s") from None
    if done.returncode:
        raise SilentSchedulerError(" ".join(done.stderr.split()))
    pairs = (line.split(maxsplit=1) for line in done.stdout.splitlines() if line.strip())
    return {number: "running" if state in ("RUNNING", "COMPLETING") else "waiting" for number, state in pairs}


def _last_words(log: Path) -> str:
    """Return what ended a job, by its log: Slurm's word on it, or kvbench's, or else the last line."""
    try:
        lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        return ""
    for beginnings in (("slurmstepd:", "slurmd:"), ("kvbench:",), ("",)):
        if words := [line for line in lines if line and line.startswith(beginnings)]:
            return words[-1]
    return ""
