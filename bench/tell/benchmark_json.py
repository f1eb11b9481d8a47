"""A run as `benchmark.json`, in the schema of pytest-benchmark: read by its `compare` and by the common CI actions."""

import json
import statistics
from typing import Any

import msgspec
import numpy as np

from bench.analysis.tidy import Tidy

SCHEMA = "5.3.1"
"""The version of pytest-benchmark whose files these look like."""


def benchmark_json(tidy: Tidy) -> str:
    """Write a benchmark per case and phase, a round per usable turn, in seconds: TTFT for prefill, TPOT for decode."""
    environments = tidy.run.environments
    cores = {environment.cores for environment in environments}
    fingerprint = environments[0].fingerprint
    facts = {name: ", ".join(tidy.run.distinct(name)) for name in ("os", "git_commit", *fingerprint)}
    machines = {plan.case.key: tidy.run.environment(plan.case).hostname for plan in tidy.run.manifest.plan}
    cases = {plan.case.key: msgspec.structs.asdict(plan.case) for plan in tidy.run.manifest.plan}
    benchmarks = [
        {
            "group": phase,
            "name": f"{phase}[{case}]",
            "fullname": f"kvbench::{phase}[{case}]",
            "params": cases[str(case)] | {"phase": phase},
            "param": case,
            "extra_info": {"machine": machines[str(case)]} if len(environments) > 1 else {},
            "options": {"disable_gc": True, "timer": "perf_counter", "warmup": True},
            "stats": _stats((rows["latency_ms"] / 1e3).tolist()),
        }
        for (case, phase), rows in tidy.by_case_and_phase.items()
    ]
    document = {
        "machine_info": {
            "node": tidy.run.machine_names,
            "system": facts["os"],
            "python_version": facts["python"],
            "cpu": {"brand_raw": facts["cpu_model"], **({"count": cores.pop()} if len(cores) == 1 else {})},
        },
        "commit_info": {
            "id": facts["git_commit"].replace("+", ""),
            "dirty": "+" in facts["git_commit"],
            "project": "kvbench",
        },
        "benchmarks": benchmarks,
        "datetime": tidy.run.manifest.created_utc,
        "version": SCHEMA,
        "kvbench": fingerprint if len(environments) == 1 else {name: facts[name] for name in fingerprint},
    }
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def _stats(seconds: list[float]) -> dict[str, Any]:
    """Compute the figures of rounds by the definitions of pytest-benchmark."""
    low, median, high = (float(value) for value in np.quantile(seconds, (0.25, 0.5, 0.75)))
    mean = statistics.fmean(seconds)
    spread = statistics.stdev(seconds) if len(seconds) > 1 else 0.0
    inside = [value for value in seconds if low - 1.5 * (high - low) <= value <= high + 1.5 * (high - low)]
    mild = len(seconds) - len(inside)
    far = sum(abs(value - mean) > spread for value in seconds)
    return {
        "min": min(seconds),
        "max": max(seconds),
        "mean": mean,
        "stddev": spread,
        "rounds": len(seconds),
        "median": median,
        "iqr": high - low,
        "q1": low,
        "q3": high,
        "iqr_outliers": mild,
        "stddev_outliers": far,
        "outliers": f"{far};{mild}",
        "ld15iqr": min(inside),
        "hd15iqr": max(inside),
        "ops": 1 / mean,
        "total": sum(seconds),
        "data": seconds,
        "iterations": 1,
    }
