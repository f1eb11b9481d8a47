"""Tidy -> the summary frame: one row per case and phase, the columns of `summary.csv` and what plots need besides."""

import statistics
from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np
import pandas as pd

from bench.analysis import columns, estimators, frames, roofline
from bench.analysis.tidy import Columns, Tidy, independent_values, paired_columns, phases
from bench.case import Case
from bench.manifest import CasePlan
from bench.record import Check
from kvcache.arithmetic.costs import Phase
from kvcache.strategies.catalogue import OFF_DEVICE, OWN, REFEEDING, STRATEGIES, YARDSTICKS, exact_of, is_lossy

WIDE_TYPES: dict[str, str] = {
    "case": "string",
    "prefill_quantized": "bool",
    **columns.TYPES,
    **dict.fromkeys(roofline.FLOOR_COLUMNS, "float64"),
    **roofline.NOTE_COLUMNS,
}
"""Columns of the wide summary and their types: the case's key, those of `summary.csv`, what plots and notes need."""


def summarize(tidy: Tidy) -> pd.DataFrame:
    """Make one row per planned case and phase, with the columns of `WIDE_TYPES`.

    Times are medians of the undisturbed turns (`Tidy.turns`) with exact 95 % intervals; the speed-ups pair a case
    with the naive one of its cell, and with hf-generate, round by round. A case that failed in any process keeps its
    rows, without a time; so does the prefill of an imported generation, which nobody timed.
    """
    plans = tidy.run.manifest.plan
    latencies, against_roofs = tidy.by_case_and_phase, roofline.columns(tidy)
    keys = {(plan.case.cell, plan.case.strategy): plan.case.key for plan in plans}
    checks: dict[str, list[Check]] = {plan.case.key: [] for plan in plans}
    for check in tidy.run.checks:
        checks[check.case].append(check)
    rows: list[dict[str, Any]] = []
    for plan in plans:
        case, outcome = plan.case, tidy.outcomes[plan.case.key]
        machine = tidy.run.environment(case).hostname
        ended = {"tokens_match": outcome.tokens_match, "status": outcome.status, "error": outcome.error}
        for phase in phases(case):
            row = {"case": case.key, **msgspec.structs.asdict(case), "phase": phase, "machine": machine, **ended}
            row["setup"] = _setup(plan)
            row |= _counters(plan, phase) | _sizes(checks[case.key], phase) | _quality(case, checks[case.key])
            row |= _memory(case, checks[case.key]) | {"weights_bytes": plan.weights_bytes}
            own = latencies.get((case.key, phase))
            if own is not None:
                row |= _times(case, phase, own)
                row["framework_ms"] = _framework_ms(checks[case.key], row) if phase == "decode" else None
            for baselines, names in _COMPARED.items():
                key = next((keys[case.cell, name] for name in baselines if (case.cell, name) in keys), "")
                row |= _ratio(names, own if case.strategy in baselines else latencies.get((key, phase)), own)
            exact = keys.get((case.cell, exact_of(case.strategy)), "")
            row |= _ratio(_VERSUS_EXACT, own, latencies.get((exact, phase)))
            held, plain = row["kv_bytes_allocated"], _sizes(checks.get(exact, []), phase)["kv_bytes_allocated"]
            row["kv_bytes_vs_exact"] = held / plain if held is not None and plain else None
            row |= against_roofs.get((case.key, phase), {})
            rows.append(row)
    _slopes(rows)
    return frames.typed(rows, list(WIDE_TYPES), WIDE_TYPES)


def _setup(plan: CasePlan) -> str | None:
    """Write the settings of a case that have no column of their own; None where all are usual."""
    parts = [f"{name}={value}" for name, value in plan.setup.items()]
    parts += ["naive_logits=all"] if plan.case.strategy in REFEEDING and plan.case.naive_logits == "all" else []
    parts += ["prefill_quantized=true"] if plan.case.prefill_quantized else []
    return " ".join(parts) or None


def _times(case: Case, phase: Phase, own: Columns) -> dict[str, Any]:
    latency_ms, low, high = estimators.median_interval(independent_values(own))
    tokens = case.batch_size * (case.n_prompt if phase == "prefill" else 1)
    return {
        "samples": len(own["latency_ms"]),
        "latency_ms": latency_ms,
        "latency_ms_low": low,
        "latency_ms_high": high,
        "tokens_per_s": tokens / latency_ms * 1000,
        "steps_timed": int(own["steps_timed"].min()) if phase == "decode" else None,
    }


_COMPARED: dict[frozenset[str], list[str]] = {
    REFEEDING: ["speedup_vs_naive", "speedup_low", "speedup_high"],
    YARDSTICKS: ["speedup_vs_hf", "speedup_vs_hf_low", "speedup_vs_hf_high"],
}
"""What a case is compared with in its cell -> the columns of the ratio and its interval."""

_VERSUS_EXACT = ["latency_vs_exact", "latency_vs_exact_low", "latency_vs_exact_high"]


def _ratio(names: list[str], above: Columns | None, below: Columns | None) -> dict[str, float | None]:
    """Return a ratio of latencies and its interval under `names`: 1 for a case over itself, nothing without a pair."""
    if above is None or below is None:
        return {}
    return dict.fromkeys(names, 1.0) if above is below else paired_columns(names, above, below, "latency_ms")


def _counters(plan: CasePlan, phase: Phase) -> dict[str, Any]:
    costs = plan.prefill if phase == "prefill" else plan.decode
    sizes: dict[str, Any] = {"kv_bytes_allocated_predicted": (plan.kv_bytes_allocated or {}).get(phase)}
    if costs is None:
        return sizes | {"kv_bytes_predicted": (plan.kv_bytes or {}).get(phase)}
    row = sizes | vars(costs) | {"flops": costs.flops}
    if plan.case.strategy.startswith(OWN):  # how a user's own cache stores its rows is not known
        return row | {"bytes": None}
    return row | {"arithmetic_intensity": costs.flops / costs.bytes, "kv_bytes_predicted": costs.kv_bytes}


def _sizes(checks: list[Check], phase: Phase) -> dict[str, Any]:
    """Take the largest of each size over the processes; peak memory and compile time are of the case as a whole."""
    fields = {
        "kv_bytes_allocated": f"kv_bytes_allocated_after_{phase}",
        "kv_bytes_measured": f"kv_bytes_after_{phase}",
        "peak_memory_bytes": "peak_memory_bytes",
        "compile_s": "compile_s",
    }
    return {column: _largest(getattr(check, field) for check in checks) for column, field in fields.items()}


def _memory(case: Case, checks: list[Check]) -> dict[str, Any]:
    """Take the largest peak over the processes, and what of it is no cache; they belong to the case as a whole."""
    peak = _largest(check.peak_beyond_weights_bytes for check in checks)
    cache = _largest(check.kv_bytes_allocated_after_decode for check in checks)
    workspace = None
    # The GPU's peak does not hold what lies in main memory.
    if peak is not None and cache is not None and peak >= cache and case.strategy not in OFF_DEVICE:
        workspace = peak - cache
    return {"peak_beyond_weights_bytes": peak, "workspace_bytes": workspace}


def _quality(case: Case, checks: list[Check]) -> dict[str, Any]:
    """Say what the strategy promises and what it lost: medians over the processes (a text is equal in all of them)."""
    promised = [check.exact for check in checks if check.exact is not None]
    known = case.strategy in STRATEGIES  # neither a user's own cache nor another tool
    exact = promised[0] if promised else not is_lossy(case.strategy) if known else None
    row: dict[str, Any] = {"exact": None if exact is None else str(exact).lower()}
    judged = [check.quality for check in checks if check.quality is not None]
    if not judged:
        return row
    medians = "top1_agreement", "recall_agreement", "logit_kl", "logit_kl_p99", "logit_kl_floor", "perplexity_ratio"
    for name in medians:
        values = [value for value in (getattr(quality, name) for quality in judged) if value is not None]
        row[name] = statistics.median(values) if values else None
    return row | {"matching_tokens": min(quality.matching_tokens for quality in judged)}


def _slopes(rows: list[dict[str, Any]]) -> None:
    """Add the bytes that a further token takes, from the cases of a strategy that differ in their lengths alone."""
    lengths = ("n_prompt", "n_depth")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row.get("kv_bytes_allocated") is not None:
            shared = (row[name] for name in frames.CASE_COLUMNS if name not in lengths)
            groups.setdefault((row["phase"], *shared), []).append(row)
    for alike in groups.values():
        tokens = [row["batch_size"] * sum(row[name] for name in lengths) for row in alike]
        if len(set(tokens)) > 1:
            slope = float(np.polyfit(tokens, [row["kv_bytes_allocated"] for row in alike], 1)[0])
            for row in alike:
                row["kv_bytes_per_token"] = max(0.0, round(slope, 6))


def _framework_ms(checks: list[Check], row: dict[str, Any]) -> float | None:
    """Find the median step without arithmetic, over all processes; None where it exceeds the whole step.

    It was timed before the rounds, so a machine that was slower then gives a part that is greater than its whole.
    """
    times = [time for check in checks for time in check.framework_step_ns or ()]
    framework_ms = statistics.median(times) / frames.NS_PER_MS if times else None
    return framework_ms if framework_ms is not None and framework_ms <= row["latency_ms"] else None


def _largest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)
