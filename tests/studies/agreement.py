"""Compares the pytest-benchmark suite (`nox -s perf`) with `kvbench run` on the same cases (7 min).

They take turns, twice. The table shows suite / run per strategy and phase: the ratio of the medians over both turns.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from bench.analysis.summary import summarize
from bench.analysis.tidy import Tidy
from bench.store.run_folder import read_run

Times = dict[tuple[str, str], float]


def suite_ms(model: str, n_prompt: int, n_gen: int, folder: Path) -> Times:
    """Median TTFT and TPOT in ms by strategy and phase, from tests/studies/test_phases.py."""
    stored = folder / "suite.json"
    chosen = ["--model", model, "--n-prompt", str(n_prompt), "--n-gen", str(n_gen), f"--benchmark-json={stored}"]
    suite = ["-m", "pytest", "-q", "-m", "perf", "tests/studies/test_phases.py", *chosen]
    subprocess.run([sys.executable, *suite], check=True, stdout=subprocess.DEVNULL)
    found: Times = {}
    for benchmark in json.loads(stored.read_text())["benchmarks"]:
        ms = benchmark["extra_info"].get("tpot_ms", 1e3 * benchmark["stats"]["median"])
        found[benchmark["params"]["strategy"], benchmark["group"]] = ms
    return found


def run_ms(model: str, n_prompt: int, n_gen: int, folder: Path) -> Times:
    """The same from `kvbench run`."""
    grid = ["-m", model, "-p", str(n_prompt), "-n", str(n_gen), "-t", "1", "-r", "12", "-o", "csv"]
    command = [sys.executable, "-m", "bench.cli", "run", *grid, "--out", str(folder / "runs")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = summarize(Tidy.of(read_run(max((folder / "runs").iterdir())))).to_dict("records")
    return {(row["strategy"], row["phase"]): row["latency_ms"] for row in rows}


def main() -> None:
    """Measure in turns and print the table."""
    parser = argparse.ArgumentParser(prog="nox -s study -- agreement", description=__doc__)
    parser.add_argument("--model", default="random:gpt2")
    model = parser.parse_args().model
    with tempfile.TemporaryDirectory() as scratch:
        turns = [(suite_ms(model, 64, 8, Path(scratch)), run_ms(model, 64, 8, Path(scratch))) for _ in range(2)]
    print(f"{model}, prompt 64, 8 new tokens, 1 thread\n\nstrategy     phase     suite ms   run ms   suite / run")
    for strategy, phase in turns[0][0]:
        suite, run = (float(np.median([turn[side][strategy, phase] for turn in turns])) for side in (0, 1))
        print(f"{strategy:12} {phase:8} {suite:9.3f} {run:8.3f} {suite / run:13.3f}")


if __name__ == "__main__":
    main()
