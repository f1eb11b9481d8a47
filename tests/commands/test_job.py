"""`kvbench job`: one group, measured by stub workers into a samples file of its own."""

import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench.analysis.tidy import Tidy
from bench.measure import jobs
from bench.store import job_files, sealed
from bench.store.run_folder import locked, read_run
from tests import stub_run
from tests.cluster import ROUNDS, make_cluster_run
from tests.commandline import refused
from tests.handmade import fail, grid, make_run


def measure(folder: Path, job: int = 0, script: dict[str, Any] | None = None, code: int = 0) -> str:
    """Run a job to its end; return what it printed on stderr."""
    path = job_files.path_of(folder, f"job-{job}")
    ended, _, stderr = stub_run.finish(["job", str(path)], folder.parent, script)
    assert ended == code, stderr
    return stderr


def change(folder: Path, **fields: Any) -> Path:
    """Write job-0 anew with other fields, sealed."""
    path = job_files.path_of(folder, "job-0")
    sealed.write(path, msgspec.structs.replace(job_files.read(path)[0], **fields))
    return path


def test_jobs_measure_a_run_and_each_stores_its_own_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = make_cluster_run(tmp_path)
    for number in (0, 1):
        monkeypatch.setenv("KVBENCH_MACHINE", f"node{number}")
        measure(folder, number)
    run = read_run(folder)
    tidy = Tidy.of(run)
    assert not tidy.unfinished
    assert {item.case.n_threads: run.environment(item.case).hostname for item in run.manifest.plan} == {
        2: "node0",
        1: "node1",
    }
    assert "job-0 is measured already" in measure(folder)
    assert sorted(path.name for path in folder.glob("samples*")) == ["samples-job-0.jsonl", "samples-job-1.jsonl"]


def test_a_job_that_was_cut_off_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the same machine the torn cell gets the rounds that it lacks; on another one it is measured anew."""
    folder, _ = make_cluster_run(tmp_path)
    monkeypatch.setenv("KVBENCH_MACHINE", "node1")
    measure(folder)
    path = folder / "samples-job-0.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-5]))
    for machine, rounds_of_the_second_file in (("node1", 2), ("node2", 3)):
        other = tmp_path / machine
        shutil.copytree(folder, other)
        monkeypatch.setenv("KVBENCH_MACHINE", machine)
        measure(other)
        run = read_run(other)
        timed = [sample for sample in run.samples if not sample.warmup and " p16 " in sample.case]
        assert [sample.round for sample in timed if "naive" in sample.case] == [0, 1, 2]
        added = (other / "samples-job-0-2.jsonl").read_text().splitlines()
        taken = [line for line in added if '"warmup":false' in line and " naive " in line]
        assert len(taken) == rounds_of_the_second_file
        assert not any(" p8 " in line for line in added)  # what is complete stays, whoever measured it


def test_a_job_past_its_time_loses_nothing_and_counts_nothing_twice(tmp_path: Path) -> None:
    """SIGTERM is what Slurm sends at a job's time limit; what is missing then is measured by `--resume`."""
    folder, _ = make_cluster_run(tmp_path)
    path = folder / "samples-job-0.jsonl"
    slow = {"naive": [{"do": "slow", "seconds": 0.2}]}
    process = stub_run.start(["job", str(job_files.path_of(folder, "job-0"))], tmp_path, slow)
    deadline = time.monotonic() + 300
    while not (path.exists() and path.read_bytes().count(b"\n") >= 9) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143
    assert f"kvbench run --resume {folder}" in errors
    assert "Traceback" not in errors
    kept = path.read_bytes()
    assert not list(folder.glob(".lock*"))
    code, _, errors = stub_run.finish(["run", "--resume", str(folder)], tmp_path)
    assert code == 0, errors
    assert path.read_bytes() == kept
    run = read_run(folder)
    assert not Tidy.of(run).unfinished  # in place of a round that was torn there is another
    rounds = Counter((sample.case, sample.round) for sample in run.samples if not sample.warmup)
    assert set(rounds.values()) == {1}
    of_case = Counter(case for case, _ in rounds)
    assert all(ROUNDS <= of_case[item.case.key] <= ROUNDS + 1 for item in run.manifest.plan)


def test_a_case_that_fails_is_stored_and_ends_the_job_with_5(tmp_path: Path) -> None:
    folder, _ = make_cluster_run(tmp_path)
    measure(folder, 0, {"dynamic": [{"do": "refuse", "status": "oom", "error": "no memory"}]}, code=5)
    assert {failure.status for failure in read_run(folder).failures} == {"oom"}
    assert "measured already" in measure(folder, code=5)


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    folder, _ = make_cluster_run(tmp_path)
    with locked(folder, "job-0"):
        assert "another process measures job-0" in measure(folder, code=2)
    measure(folder)
    assert not list(folder.glob(".lock*"))


@pytest.mark.parametrize("outside", ["../..", "../../elsewhere", "/elsewhere", "../jobs/.."])
def test_a_path_outside_of_the_run_folder_is_refused(tmp_path: Path, outside: str) -> None:
    folder, _ = make_cluster_run(tmp_path / "runs")
    path = change(folder, run_folder=outside)
    if outside == "../jobs/..":  # the run folder itself
        measure(folder)
        return
    message = refused("job", str(path))
    assert "outside of the run folder" in message
    assert list(tmp_path.rglob("samples*")) == []


@pytest.mark.parametrize("name", ["../job-0", "x", "job-0/../../y"])
def test_a_job_of_another_name_is_refused(tmp_path: Path, name: str) -> None:
    folder, _ = make_cluster_run(tmp_path)
    assert "outside of the run folder" in refused("job", str(change(folder, job=name)))


def test_a_newer_schema_and_a_damaged_file_are_refused(tmp_path: Path) -> None:
    folder, _ = make_cluster_run(tmp_path)
    path = change(folder, schema_version=job_files.JOB_VERSION + 1)
    assert "schema 2 is newer than this kvbench reads (1); upgrade kvbench" in refused("job", str(path), code=3)
    path.write_text(path.read_text().replace('"schema_version": 2', '"schema_version": 1'))
    assert "damaged" in refused("job", str(path), code=3)
    assert "No such file" in refused("job", str(tmp_path / "none.json"), code=3)


def test_a_job_without_a_case_is_refused(tmp_path: Path) -> None:
    folder, manifest = make_cluster_run(tmp_path)
    path = change(folder, manifest=msgspec.structs.replace(manifest, plan=[]))
    assert "job-0.json: plans no case" in refused("job", str(path), code=3)


def test_a_job_of_another_run_is_refused(tmp_path: Path) -> None:
    folder, manifest = make_cluster_run(tmp_path)
    other = msgspec.structs.replace(manifest, run_id="another")
    sealed.write(folder / "manifest.json", other)
    assert "is a job of the run handmade, but" in measure(folder, code=3)


def test_a_machine_with_too_few_cores_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = make_cluster_run(tmp_path)
    monkeypatch.setattr("bench.measure.jobs.allowed_cores", lambda: 1)
    assert "needs 2 threads, this process may use 1 core" in measure(folder, code=2)


def test_a_shared_folder_that_vanishes_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = make_cluster_run(tmp_path / "runs")
    monkeypatch.setattr(jobs, "measure_cases", lambda *_: shutil.rmtree(folder))
    message = measure(folder, code=5).splitlines()
    assert "gone while job-0 was measured, and its samples with it" in message[-1]
    assert "Traceback" not in "".join(message)


@pytest.mark.parametrize(("rounds", "failed"), [(3, True), (6, False)])
def test_a_dead_worker_is_forgiven_only_if_another_did_all_the_rounds(rounds: int, failed: bool) -> None:
    (case,) = grid(["dynamic"], [128])
    died = msgspec.structs.replace(fail(case, "oom", "killed"), worker_died=True)
    run = msgspec.structs.replace(make_run([case], rounds=rounds, repetitions=6), failures=[died])
    assert jobs.has_failed(run) is failed
