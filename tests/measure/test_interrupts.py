"""A run that is killed or interrupted, at any moment: what was measured is kept, and resumed."""

import multiprocessing
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest

from bench.measure.worker_process import kill_tree
from bench.store.run_folder import read_run
from tests import inline, stub_run
from tests.commandline import kvbench

GRID = ["-m", "random:tiny", "-t", "1", "-p", "8,16", "-n", "8", "--strategies", "naive,dynamic"]
ROUNDS = 12
SLOW = {"naive": [{"do": "slow", "seconds": 0.02}]}
"""Slow enough to be caught in the act."""


def started(out: Path, *flags: str, script: Any = SLOW, killed: bool = False) -> subprocess.Popen[str]:
    arguments = ["run", *GRID, "-r", str(ROUNDS), "--name", "killed", *flags, "--out", str(out)]
    return stub_run.start(arguments, out, script, killed=killed)


def samples_file(out: Path, pid: int, n_lines: int) -> Path:
    """Wait until the run of process `pid` has stored so many lines."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        for path in out.glob("*-killed/samples.jsonl"):
            if path.read_bytes().count(b"\n") >= n_lines:
                return path
        time.sleep(0.01)  # the run goes on in the processes under test
    raise AssertionError("the run ended, or stored nothing in ten minutes")


def workers_of(pid: int) -> list[psutil.Process]:
    """What the fork server of the run of process `pid` has forked."""
    (server,) = psutil.Process(pid).children()
    return list(server.children())


def resumed_rows(path: Path, kept: bytes, out: str) -> pd.DataFrame:
    """The summary of a resumed run, whose first samples file is as it was."""
    assert path.read_bytes()[: len(kept.rpartition(b"\n")[0])] == kept.rpartition(b"\n")[0]
    return pd.read_csv(Path(out.strip().splitlines()[-1]) / "summary.csv")


@pytest.mark.parametrize(("victim", "n_lines"), [("parent", 0), ("parent", 33), ("worker", 21)])
def test_killed_run_resumes_to_the_same_cases(n_lines: int, victim: str, tmp_path: Path) -> None:
    process = started(tmp_path, *([] if n_lines == 33 else ["--no-ceilings"]), killed=victim == "parent")
    path = samples_file(tmp_path, process.pid, n_lines)
    if victim == "worker":
        workers = workers_of(process.pid)
        workers[n_lines % len(workers)].kill()
        process.wait(timeout=120)
    process.kill()
    process.communicate()
    kept = path.read_bytes()
    code, out, errors = stub_run.finish(["run", "--resume", str(path.parent)], tmp_path)
    assert code == 0, errors
    rows = resumed_rows(path, kept, out)
    assert len(rows) == 2 * 2 * 2
    assert set(rows["status"]) == {"ok"}
    assert (rows["samples"] >= ROUNDS).all()


def test_a_real_run_that_is_killed_resumes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the user's own model, driven by a fork of this process, which has torch already; its workers are real."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("bench.tell.report.write_plots", lambda report, derived: {})
    Path("theirs.py").write_text("from kvcache.models import load\ndef make():\n    return load('random:tiny')\n")
    own = [*GRID[2:], "-m", "py:theirs:make", "-r", "6", "--no-ceilings", "--name", "killed", "--out", str(tmp_path)]
    process = multiprocessing.get_context("fork").Process(target=kvbench, args=["run", *own])
    process.start()
    assert process.pid is not None
    path = samples_file(tmp_path, process.pid, 12)
    workers = workers_of(process.pid)
    process.kill()
    process.join()
    assert not psutil.wait_procs(workers, timeout=30)[1]  # they die with it
    inline.use(monkeypatch)
    rows = resumed_rows(path, path.read_bytes(), kvbench("run", "--resume", str(path.parent)).stdout)
    assert set(rows["status"]) == {"ok"}
    turns = Counter(sample.case for sample in read_run(path.parent).samples if not sample.warmup)
    assert min(turns.values()) >= 6


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupt_keeps_what_was_measured(number: signal.Signals, code: int, tmp_path: Path) -> None:
    process = started(tmp_path, "--no-ceilings")
    path = samples_file(tmp_path, process.pid, 20)
    workers = workers_of(process.pid)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"--resume {path.parent}" in errors
    assert "Traceback" not in errors
    assert path.read_bytes().count(b"\n") >= 20
    assert not psutil.wait_procs(workers, timeout=30)[1]


HANGING = {"ceilings": [{"on": "choose-ceilings", "do": "hang"}]}


@pytest.mark.parametrize(
    ("number", "code", "script", "stage", "says"),
    [
        (signal.SIGINT, 130, HANGING, "measuring the machine's ceilings", "interrupted; nothing was measured yet"),
        (signal.SIGTERM, 143, SLOW, "starting the workers", "terminated; what was measured is kept"),
    ],
)
def test_interrupt_before_the_first_turn_says_what_is_kept(
    number: signal.Signals, code: int, script: Any, stage: str, says: str, tmp_path: Path
) -> None:
    process = started(tmp_path, script=script)
    assert process.stderr is not None
    assert any(line.startswith(stage) for line in process.stderr)  # reads up to that line
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    (complaint,) = [line for line in errors.splitlines() if line.startswith("kvbench:")]
    assert says in complaint
    folders = [folder for folder in tmp_path.iterdir() if folder.name.endswith("-killed")]
    assert [str(folder) in complaint for folder in folders] == ([] if "nothing" in says else [True])
    assert "Traceback" not in errors
    assert not psutil.wait_procs(workers, timeout=30)[1]


def test_what_a_worker_started_ends_with_it() -> None:
    """A compiler that a library runs for a worker would otherwise go on with nobody to wait for it."""
    worker = psutil.Popen(["sh", "-c", "sh -c 'sleep 300 & wait' & wait"])
    deadline = time.monotonic() + 60
    while len(started := worker.children(recursive=True)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    kill_tree(worker)
    assert len(started) == 2
    assert not psutil.wait_procs([worker, *started], timeout=30)[1]
