"""A run that is killed or interrupted, at any moment: what was measured is kept, and resumed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest

from tests.commands.test_cli import kvbench

KILLED_GRID = ["-m", "random:tiny", "-t", "1", "-p", "8,16", "-n", "8", "--strategies", "naive,dynamic"]
KILLED_ROUNDS = 12


def started(out: Path, *flags: str) -> subprocess.Popen[str]:
    tree = str(Path(__file__).resolve().parents[2])
    grid = [*KILLED_GRID, "-r", str(KILLED_ROUNDS), "--name", "killed", *flags]
    return subprocess.Popen(
        [sys.executable, "-m", "bench.cli", "run", *grid, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": tree},
    )


def samples_file(out: Path, process: subprocess.Popen[str], n_lines: int) -> Path:
    """Wait until the run has stored so many lines."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        for path in out.glob("*-killed/samples.jsonl"):
            if path.read_bytes().count(b"\n") >= n_lines:
                return path
        time.sleep(0.01)  # the run goes on in the processes under test
    raise AssertionError("the run ended, or stored nothing in two minutes")


@pytest.mark.parametrize(("victim", "n_lines"), [("parent", 0), ("parent", 9), ("parent", 33), ("worker", 21)])
def test_killed_run_resumes_to_the_same_cases(n_lines: int, victim: str, tmp_path: Path) -> None:
    process = started(tmp_path, *([] if n_lines == 33 else ["--no-ceilings"]))
    path = samples_file(tmp_path, process, n_lines)
    if victim == "worker":
        children = psutil.Process(process.pid).children(recursive=True)
        (children[n_lines % len(children)] if children else process).kill()
        process.wait(timeout=120)
    process.kill()
    process.wait()
    kept = path.read_bytes()
    done = kvbench("run", "--resume", str(path.parent))
    assert path.read_bytes()[: len(kept.rpartition(b"\n")[0])] == kept.rpartition(b"\n")[0]
    folder = Path(done.stdout.strip().splitlines()[-1])
    rows = pd.read_csv(folder / "summary.csv")
    assert len(rows) == 2 * 2 * 2
    assert set(rows["status"]) == {"ok"}
    assert (rows["samples"] >= KILLED_ROUNDS).all()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupt_keeps_what_was_measured(number: signal.Signals, code: int, tmp_path: Path) -> None:
    process = started(tmp_path, "--no-ceilings")
    path = samples_file(tmp_path, process, 20)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"--resume {path.parent}" in errors
    assert "Traceback" not in errors
    assert path.read_bytes().count(b"\n") >= 20
    psutil.wait_procs(workers, timeout=10)
    assert not any(worker.is_running() for worker in workers)


@pytest.mark.parametrize(
    ("number", "code", "stage", "says"),
    [
        (signal.SIGINT, 130, "measuring the machine's ceilings", "interrupted; nothing was measured yet"),
        (signal.SIGTERM, 143, "starting the workers", "terminated; what was measured is kept"),
    ],
)
def test_interrupt_before_the_first_turn_says_what_is_kept(
    number: signal.Signals, code: int, stage: str, says: str, tmp_path: Path
) -> None:
    process = started(tmp_path)
    assert process.stderr is not None
    assert any(line.startswith(stage) for line in process.stderr)  # reads up to that line
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    (told,) = [line for line in errors.splitlines() if line.startswith("kvbench:")]
    assert says in told
    assert [str(folder) in told for folder in tmp_path.iterdir()] == ([] if "nothing" in says else [True])
    assert "Traceback" not in errors
    psutil.wait_procs(workers, timeout=10)
    assert not any(worker.is_running() for worker in workers)
