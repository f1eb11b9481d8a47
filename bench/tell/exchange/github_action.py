"""The two files of github-action-benchmark's custom tools, smaller and bigger is better.

https://github.com/benchmark-action/github-action-benchmark: `tool: customSmallerIsBetter`, `customBiggerIsBetter`.
"""

import json
from typing import Any

import pandas as pd

from bench.analysis import frames
from bench.analysis.tidy import Tidy
from bench.naming import Row
from bench.tell.words import missing, number


def documents(tidy: Tidy, summary: pd.DataFrame) -> dict[str, bytes]:
    """Write latencies in ms for customSmallerIsBetter, and tokens per second for customBiggerIsBetter."""
    machines = {plan.case.key: tidy.run.environment(plan.case) for plan in tidy.run.manifest.plan}
    extra = {
        case: f"{machine.cpu_model}, torch {machine.torch}, transformers {machine.transformers}"
        for case, machine in machines.items()
    }
    timed = frames.records(summary[summary["latency_ms"].notna()])
    smaller = [_entry(row, "ms", row["latency_ms"], extra[row["case"]], 1.0) for row in timed]
    bigger = [
        _entry(row, "tokens/s", row["tokens_per_s"], extra[row["case"]], row["tokens_per_s"] * row["latency_ms"])
        for row in timed
    ]
    return {
        f"github-{name}-is-better.json": f"{json.dumps(entries, indent=1, allow_nan=False)}\n".encode()
        for name, entries in (("smaller", smaller), ("bigger", bigger))
    }


def _entry(row: Row, unit: str, value: float, extra: str, tokens: float) -> dict[str, Any]:
    entry = {"name": f"{row['phase']}[{row['case']}]", "unit": unit, "value": value, "extra": extra}
    ends = [row["latency_ms_low"], row["latency_ms_high"]]
    if not missing(ends[0]):
        low, high = ends if unit == "ms" else [tokens / end for end in reversed(ends)]
        entry["range"] = f"{number(low)} to {number(high)}"
    return entry
