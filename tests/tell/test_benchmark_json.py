"""A run's benchmark.json is read by the real pytest-benchmark."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench.analysis.summary import summarize
from bench.analysis.tidy import Tidy
from bench.tell.benchmark_json import benchmark_json
from tests.handmade import fail, grid, make_run

CASES = grid(["naive", "dynamic"], [32, 128], n_gen=4)


def test_a_benchmark_per_case_and_phase() -> None:
    run = make_run(CASES, failures=[fail(CASES[3])])
    told = json.loads(benchmark_json(Tidy.of(run)))
    assert len(told["benchmarks"]) == 6
    summary = summarize(Tidy.of(run)).dropna(subset=["latency_ms"])
    medians = [benchmark["stats"]["median"] * 1e3 for benchmark in told["benchmarks"]]
    assert medians == pytest.approx(summary["latency_ms"].to_list())
    first = told["benchmarks"][0]
    assert (first["params"]["strategy"], first["params"]["n_prompt"], first["group"]) == ("naive", 32, "prefill")
    assert first["stats"]["rounds"] == len(first["stats"]["data"]) == 6


def test_statistics_are_those_of_pytest_benchmark() -> None:
    from pytest_benchmark.stats import Stats

    run = make_run(CASES, rounds=9, turn_noise=0.2)
    for benchmark in json.loads(benchmark_json(Tidy.of(run)))["benchmarks"]:
        theirs = Stats()
        for value in benchmark["stats"]["data"]:
            theirs.update(value)
        for name in ("min", "max", "mean", "stddev", "median", "ops", "total", "rounds"):
            assert benchmark["stats"][name] == pytest.approx(getattr(theirs, name)), name
        assert benchmark["stats"]["q1"] <= theirs.median <= benchmark["stats"]["q3"]
    assert np.isfinite(theirs.mean)


@pytest.mark.skipif(shutil.which("git") is None, reason="pytest-benchmark asks git for the commit")
def test_pytest_benchmark_compares_two_runs(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        (tmp_path / f"{name}.json").write_text(benchmark_json(Tidy.of(make_run(CASES, seed=seed))))
    command = [sys.executable, "-m", "pytest_benchmark", "compare", "a.json", "b.json", "--group-by=name"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("benchmark 'decode[") == 4
    assert "dynamic" in done.stdout
