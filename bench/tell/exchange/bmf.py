"""Bencher Metric Format, which `bencher run --adapter json` reads (https://bencher.dev/bmf.json)."""

import json
from typing import Any

import pandas as pd

from bench.analysis import frames
from bench.analysis.frames import NS_PER_MS
from bench.analysis.tidy import Tidy
from bench.naming import Row
from bench.tell.words import missing


def documents(tidy: Tidy, summary: pd.DataFrame) -> dict[str, bytes]:
    """Write a benchmark per case and phase: `latency` in ns and `throughput` in tokens per second, with intervals."""
    timed = frames.records(summary[summary["latency_ms"].notna()])
    found = {f"{row['phase']}[{row['case']}]": _measures(row) for row in timed}
    return {"bmf.json": f"{json.dumps(found, indent=1, allow_nan=False)}\n".encode()}


def _measures(row: Row) -> dict[str, dict[str, float]]:
    tokens = row["tokens_per_s"] * row["latency_ms"]
    low, high = row["latency_ms_low"], row["latency_ms_high"]
    latency: dict[str, Any] = {"value": row["latency_ms"] * NS_PER_MS}
    throughput: dict[str, Any] = {"value": row["tokens_per_s"]}
    if not missing(low):
        latency |= {"lower_value": low * NS_PER_MS, "upper_value": high * NS_PER_MS}
        throughput |= {"lower_value": tokens / high, "upper_value": tokens / low}
    return {"latency": latency, "throughput": throughput}
