"""A run of jobs: submitted, watched and resumed, by a scheduler in this process."""

import errno
import importlib.util
import os
import re
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from bench.machine.cpu import Cpu
from bench.manifest import Cluster
from bench.measure import cluster, cluster_run
from bench.measure.cluster import SilentSchedulerError, State
from bench.store import sealed
from bench.store.run_folder import read_run
from tests import stub_run
from tests.cluster import node, write_attempt
from tests.commandline import kvbench

RUN = ["run", "--cluster", "slurm", "-m", "random:tiny", "-p", "8", "-n", "4", "-r", "1", "-t", "1,2"]
RUN += ["--strategies", "naive,dynamic", "--dtype", "float32,bfloat16", "--no-ceilings"]
"""Four jobs of one cell."""


class InProcess:
    """A job ends at each look, with samples made by hand; `loses` end without any, `queued` were found in the queue."""

    submitted: ClassVar[list[list[str]]]
    loses: ClassVar[set[str]] = set()
    queued: ClassVar[set[str]] = set()
    silent = 0
    """The first looks that are not answered."""
    interrupts = vanishes = False
    cancelled = False

    def __init__(self, folder: Path, options: Cluster) -> None:
        self.folder, self.options, self.left, self.ended = folder, options, [*sorted(self.queued)], list[str]()

    def attach(self) -> set[str]:
        return set(self.queued)

    def submit(self, jobs: Sequence[str]) -> None:
        type(self).submitted.append(list(jobs))
        self.left += jobs

    def states(self) -> dict[str, State]:
        if self.silent > 0:
            type(self).silent -= 1
            raise SilentSchedulerError("squeue: no answer")
        if self.interrupts and self.ended:
            signal.raise_signal(signal.SIGINT)
        if self.vanishes:
            shutil.rmtree(self.folder)
            self.vanishes = False
        job = self.left.pop(0)
        if job not in self.loses and self.folder.exists():
            number = int(job.removeprefix("job-"))
            write_attempt(self.folder, node("node1"), job, job=number, rounds=1, cells=(8,))
        self.ended.append(job)
        return dict.fromkeys(self.ended, "ended") | dict.fromkeys(self.left, "waiting")

    def cancel(self) -> None:
        type(self).cancelled = True

    def left_alone(self) -> str:
        return "the jobs go on in Slurm (cancel them with: scancel 7)"

    def reason(self, job: str) -> str:
        return "slurmstepd: error: *** JOB 7 ON node2 CANCELLED ***"


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> type[InProcess]:
    class Scheduler(InProcess):
        submitted: ClassVar[list[list[str]]] = []

    monkeypatch.setattr(cluster_run, "scheduler", Scheduler)
    monkeypatch.setattr(cluster_run, "SHORTEST_PAUSE_S", 0.0)
    monkeypatch.setattr("bench.commands.run.refuse_unavailable", lambda kind: None, raising=False)
    monkeypatch.setattr(cluster, "refuse_unavailable", lambda kind: None)
    return Scheduler


def run(arguments: Sequence[str], out: Path, code: int = 0) -> tuple[str, str]:
    ended, stdout, stderr = stub_run.finish([*arguments, "--out", str(out)], out)
    assert ended == code, stderr
    assert "Traceback" not in stderr
    return stdout, stderr


def only(out: Path) -> Path:
    (folder,) = out.glob("[!.]*")
    return folder


def test_every_group_is_a_job_and_the_table_is_that_of_a_run(tmp_path: Path, scheduler: Any) -> None:
    stdout, stderr = run([*RUN, "--slurm-parallel", "3", "--slurm-options", "account=physics gres=gpu:1"], tmp_path)
    folder = only(tmp_path)
    assert stdout.splitlines()[-1] == str(folder)
    assert scheduler.submitted == [["job-0", "job-1", "job-2", "job-3"]]
    assert "4 of 4 jobs to measure" in stderr
    assert "1 done, 0 running, 3 waiting, 0 failed" in stderr
    stored = read_run(folder).manifest.cluster
    assert stored == Cluster(kind="slurm", parallel=3, options={"account": "physics", "gres": "gpu:1"})
    for dtype in ("float32", "bfloat16"):
        assert f"random:tiny, {dtype}, cpu, 1 thread, " in stdout
        assert f"random:tiny, {dtype}, cpu, 2 threads, " in stdout


def test_a_file_says_how_jobs_are_started(tmp_path: Path, scheduler: Any) -> None:
    config = tmp_path / "ci.toml"
    config.write_text('cluster = "slurm"\nslurm-partition = "cpu"\nslurm-parallel = 3\n')
    run(["run", *RUN[3:], "--config", str(config)], tmp_path / "runs")
    assert scheduler.submitted == [["job-0", "job-1", "job-2", "job-3"]]
    stored = read_run(only(tmp_path / "runs")).manifest.cluster
    assert stored == Cluster(kind="slurm", partition="cpu", parallel=3)


def test_resume_submits_what_is_missing_and_not_what_still_waits(tmp_path: Path, scheduler: Any) -> None:
    scheduler.loses = {"job-1", "job-3"}
    _, stderr = run(RUN, tmp_path, code=5)
    folder = only(tmp_path)
    assert "job-1 failed: slurmstepd: error: *** JOB 7 ON node2 CANCELLED ***" in stderr
    assert stderr.splitlines()[-1] == f"kvbench: not finished: job-1, job-3; go on with: kvbench run --resume {folder}"
    before = read_run(folder).samples
    scheduler.loses, scheduler.queued = set(), {"job-3"}
    resume = ["run", "--resume", folder.name, "--slurm-time", "240"]
    _, stderr = run(resume, tmp_path)
    assert scheduler.submitted[1:] == [["job-1"]]
    assert "2 of 4 jobs to measure" in stderr
    after = read_run(folder)
    assert len(after.samples) == 2 * len(before)
    assert all(sample in after.samples for sample in before)
    run(resume, tmp_path)
    assert scheduler.submitted[2:] == [[]]  # there is nothing left


def test_resume_writes_a_lost_job_file_again_and_no_stray_one_matters(tmp_path: Path, scheduler: Any) -> None:
    scheduler.loses = {"job-1"}
    run(RUN, tmp_path, code=5)
    jobs = only(tmp_path) / "jobs"
    before = {path.name: path.read_bytes() for path in jobs.iterdir()}
    shutil.copy(jobs / "job-0.json", jobs / "job-0 (copy).json")
    (jobs / "job-1.json").unlink()
    run(["run", "--resume", only(tmp_path).name], tmp_path, code=5)
    assert (jobs / "job-1.json").read_bytes() == before["job-1.json"]
    shutil.rmtree(jobs)
    scheduler.loses = set()
    run(["run", "--resume", only(tmp_path).name], tmp_path)
    assert scheduler.submitted[1:] == [["job-1"], ["job-1"]]
    assert {path.name for path in jobs.iterdir()} == before.keys()


@pytest.mark.parametrize("cancels", [True, False])
def test_ctrl_c_asks_whether_to_cancel(
    tmp_path: Path, scheduler: Any, monkeypatch: pytest.MonkeyPatch, *, cancels: bool
) -> None:
    scheduler.interrupts = True
    if cancels:
        monkeypatch.setattr("bench.commands.run.ask", lambda question: True)
    _, stderr = run(RUN, tmp_path, code=130)
    assert scheduler.cancelled == cancels
    last = stderr.splitlines()[-1]
    assert ("the jobs are cancelled" if cancels else "cancel them with: scancel 7") in last
    assert f"kvbench run --resume {only(tmp_path)}" in last


def test_a_scheduler_that_is_silent_for_a_while_is_asked_again(tmp_path: Path, scheduler: Any) -> None:
    scheduler.silent = 2
    _, stderr = run(RUN, tmp_path)
    assert stderr.count("squeue: no answer; asking again") == 1


def test_a_shared_folder_that_vanishes_is_one_line(tmp_path: Path, scheduler: Any) -> None:
    scheduler.vanishes = True
    _, stderr = run(RUN, tmp_path, code=3)
    assert stderr.splitlines()[-1].endswith("manifest.json: No such file or directory")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--slurm-time", "5"], "--slurm-time: is for jobs in Slurm; add --cluster slurm"),
        (["--cluster", "local", "--slurm-partition", "x"], "--slurm-partition: is for jobs in Slurm"),
        (["--cluster", "slurm"], "--threads: give it with --cluster"),
        (["--cluster", "slurm", "-t", "1", "--slurm-options", "gpu"], "--slurm-options gpu: give NAME=VALUE"),
        (["--cluster", "slurm", "-t", "1", "--slurm-options", "comment='x"], "--slurm-options comment='x: No closing"),
        (["--cluster", "k8s"], "--cluster k8s: unknown (valid: slurm, local, files)"),
    ],
)
def test_flags_that_make_no_sense_are_refused(tmp_path: Path, arguments: list[str], says: str, scheduler: Any) -> None:
    _, stderr = run(["run", "-m", "random:tiny", *arguments], tmp_path, code=2)
    assert says in stderr
    assert not list(tmp_path.iterdir())


def test_a_missing_submitit_or_sbatch_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert "there is no sbatch here" in run(RUN, tmp_path, code=2)[1]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "needs submitit: pip install 'kvbench[cluster]'" in run(RUN, tmp_path, code=2)[1]


def test_the_queue_is_asked_without_the_users_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user id without an entry in the password file has none."""

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "squeue").write_text('#!/bin/sh\ncase "$*" in *--me*) echo "7_0 RUNNING";; esac\n')
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "submitted.jsonl").write_text('{"job-0":"7_0","job-1":"7_1"}\n')
    assert cluster.Slurm(tmp_path, Cluster(kind="slurm")).attach() == {"job-0"}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make sbatch a shell script of this text, and srun and squeue ones that know of no job."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(cluster_run, "SHORTEST_PAUSE_S", 0.0)

    def install(sbatch: str) -> None:
        for name, text in {"sbatch": sbatch, "srun": ":", "squeue": ":"}.items():
            (programs / name).write_text(f"#!/bin/sh\n{text}\n")
            (programs / name).chmod(0o755)

    return install


def test_sbatch_gets_one_array_of_whole_nodes_with_the_users_choices(
    tmp_path: Path, slurm: Callable[[str], None]
) -> None:
    slurm(f'cp "$1" {tmp_path}/seen; echo "Submitted batch job 7"')
    flags = ["--slurm-partition", "cpu", "--slurm-constraint", "avx512", "--slurm-time", "240"]
    flags += ["--slurm-parallel", "3", "--slurm-options", "account=physics"]
    run([*RUN, *flags], tmp_path / "out", code=5)  # squeue knows no job: all have ended, without a sample
    lines = (tmp_path / "seen").read_text().splitlines()
    asked = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")}
    expected = {"--exclusive", "--partition=cpu", "--constraint=avx512", "--time=240", "--account=physics"}
    assert {*expected, "--array=0-3%3", "--nodes=1", "--ntasks-per-node=1", "--mem=0"} <= asked


def test_what_slurm_refuses_leaves_nothing(tmp_path: Path, slurm: Callable[[str], None]) -> None:
    slurm("echo 'sbatch: error: invalid partition' >&2; exit 1")
    out = tmp_path / "out"
    _, stderr = run(RUN, out, code=2)
    assert stderr.splitlines()[-1] == "kvbench: --cluster slurm: sbatch: error: invalid partition"
    assert [path.name for path in out.rglob("*")] == [".gitignore"]


@pytest.mark.parametrize(("name", "code"), [("INT", 130), ("TERM", 143), ("HUP", 143), ("XCPU", 143)])
def test_an_array_that_slurm_took_is_recorded_whatever_comes_meanwhile(
    tmp_path: Path, slurm: Callable[[str], None], name: str, code: int
) -> None:
    slurm(f'kill -{name} $PPID; kill -{name} $$; echo "Submitted batch job 7"')
    _, stderr = run(RUN, tmp_path / "out", code=code)
    assert "cancel them with: scancel 7" in stderr.splitlines()[-1]
    recorded = only(tmp_path / "out") / "jobs" / "submitted.jsonl"
    assert '"job-3":"7_3"' in recorded.read_text()
    with recorded.open("a") as file:
        file.write('{"job-0":"to')  # as a kill leaves it
    slurm('echo "Submitted batch job 8"')
    run(["run", "--resume", str(only(tmp_path / "out"))], tmp_path / "out", code=5)
    (tmp_path / "bin" / "squeue").write_text('#!/bin/sh\necho "8_2 PENDING"\n')
    assert cluster.Slurm(only(tmp_path / "out"), Cluster(kind="slurm")).attach() == {"job-2"}


def test_an_array_that_cannot_be_recorded_is_named(tmp_path: Path, slurm: Callable[[str], None]) -> None:
    slurm('mkdir "$(dirname "$1")/../submitted.jsonl"; echo "Submitted batch job 7"')
    _, stderr = run(RUN, tmp_path / "out", code=5)
    assert "submitted.jsonl: Is a directory" in stderr.splitlines()[-1]
    assert "cancel them with: scancel 7" in stderr.splitlines()[-1]


def test_job_files_that_cannot_be_written_leave_nothing(
    tmp_path: Path, scheduler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = sealed.write

    def full(path: Path, document: Any) -> Any:
        if path.name == "job-1.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, document)

    monkeypatch.setattr(sealed, "write", full)
    _, stderr = run(RUN, tmp_path, code=2)
    assert "cannot be written (No space left on device)" in stderr.splitlines()[-1]
    assert [path.name for path in tmp_path.rglob("*") if path.name != ".gitignore"] == []
    assert scheduler.submitted == []


FILES = [word.replace("slurm", "files").replace("1,2", "1,4096") for word in RUN]


def test_job_files_for_other_schedulers_need_neither_slurm_nor_this_machines_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(cluster_run, "scheduler", None)
    stdout, stderr = run(FILES, tmp_path)
    folder = only(tmp_path)
    assert stdout == f"{folder}\n"
    assert f"job files to measure, each by `kvbench job FILE`: 4 in {folder}/jobs" in stderr
    assert {path.name for path in (folder / "jobs").iterdir()} == {f"job-{n}.json" for n in range(4)}
    assert max(item.case.n_threads for item in read_run(folder).manifest.plan) == 4096
    (folder / "jobs" / "job-2.json").unlink()
    run(["run", "--resume", str(folder)], tmp_path)
    assert (folder / "jobs" / "job-2.json").exists()


def test_a_dry_run_budgets_each_job_and_looks_at_no_memory_of_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cpu, "available_memory_bytes", staticmethod(lambda: 1))
    alone = ["run", "--dry-run", "-m", "random:gpt2", "-p", "512", "-n", "16", "--budget", "1.5", "-t", "1"]
    alone += ["--strategies", "naive,dynamic", "-r", "12", "--cluster", "slurm"]
    one, both = (kvbench(*alone, "--dtype", types).stdout for types in ("float32", "float32,bfloat16,float16"))
    assert "DOES NOT FIT" not in both
    assert "DOES NOT FIT" in kvbench(*alone[:-1], "local").stdout
    assert "--budget 1.5: " in one
    pattern = r"cases, (.+) rounds each: very roughly (\d+) min in (\d) jobs?, (\d+) min the longest, and at most"
    (few, minutes, _, longest), (same, in_all, jobs, most) = (re.findall(pattern, text)[0] for text in (one, both))
    assert minutes == longest == most
    assert (same.split(" to ")[0], jobs) == (few, "3")
    assert int(few) > 6  # the fewest that a budget leaves, which three jobs in one would have
    assert int(in_all) == 3 * int(minutes)


def test_local_jobs_run_one_after_another(tmp_path: Path) -> None:
    """By submitit, in processes of their own."""
    arguments = [word.replace("slurm", "local") for word in RUN] + ["--dtype", "float32", "--strategies", "dynamic"]
    stdout, stderr = run(arguments, tmp_path)
    assert "0 done, 1 running, 1 waiting, 0 failed" in stderr
    assert "2 running" not in stderr
    assert ", cpu, 1 thread, " in stdout
    assert ", cpu, 2 threads, " in stdout
    assert sorted(path.name for path in only(tmp_path).glob("samples*")) == [f"samples-job-{n}.jsonl" for n in (0, 1)]
