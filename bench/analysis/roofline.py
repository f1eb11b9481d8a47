"""Each case against the machine's roofs: MFU, MBU, what binds it, and what costs and roofs predict for it.

The roofline model (Williams, Waterman & Patterson, CACM 52(4), 2009): a forward takes at least its FLOPs at the GEMM
rate, and at least its bytes at the read bandwidth. Both roofs are those measured in the rounds of the case itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from bench.analysis import round_pairs, rounds
from bench.analysis.prediction import Point, leave_one_out
from bench.case import Group
from bench.record import CasePlan, Run
from kvcache.arithmetic.costs import Costs

CACHES = 2
"""MBU is empty for weights of at most so many last-level caches: part of them is read from there, not from memory."""

OVERHEAD_SHARE = 0.5
"""Where both floors are under this share of the measured time, neither roof binds: the rest is overhead."""

FLOOR_COLUMNS: list[str] = ["compute_floor_ms", "memory_floor_ms", "gemm_flop_per_s", "read_bytes_per_s"]
"""A forward's floors and the medians of the roofs they come from: no columns of the summary, but plots draw them."""

Latencies = Mapping[tuple[str, str], pd.DataFrame]
"""(case key, phase) -> its usable turns (`bench.analysis.rounds.usable_turns`)."""


def columns(run: Run, latencies: Latencies) -> dict[tuple[str, str], dict[str, Any]]:
    """(case key, phase) -> mfu, mbu, their intervals, bound, predicted_ms, and the `FLOOR_COLUMNS`.

    A case without costs, times, or ceilings measured beside it has no entry.
    """
    roofs = dict(iter(rounds.usable_ceilings(run).groupby(["cell", "ceiling"])))
    found: dict[tuple[str, str], dict[str, Any]] = {}
    curves: dict[tuple[Group, str, str], dict[tuple[str, str], Point]] = {}
    for plan in run.manifest.plan:
        cell = plan.case.cell.key
        gemm, read = roofs.get((cell, "gemm")), roofs.get((cell, "read_bandwidth"))
        if gemm is None or read is None:
            continue
        for phase, costs in (("prefill", plan.prefill), ("decode", plan.decode)):
            key = (plan.case.key, phase)
            if costs is None or key not in latencies:
                continue
            found[key] = _row(plan, costs, latencies[key], gemm, read)
            floors = found[key]["compute_floor_ms"], found[key]["memory_floor_ms"]
            point = Point(*floors, float(latencies[key]["latency_ms"].median()))
            curves.setdefault((plan.case.group, plan.case.strategy, phase), {})[key] = point
    for points in curves.values():
        for key, predicted_ms in zip(points, leave_one_out(list(points.values())), strict=True):
            found[key]["predicted_ms"] = predicted_ms
    return found


def with_floors(run: Run, summary: pd.DataFrame) -> pd.DataFrame:
    """The summary of `run` (as `summarize` makes it) and the `FLOOR_COLUMNS` of each row, empty where not known."""
    found = columns(run, rounds.by_case_and_phase(run))
    keys = [
        (plan.case.key, phase)
        for plan in run.manifest.plan
        for phase in (("prefill", "decode") if plan.case.n_gen > 1 else ("prefill",))
    ]
    values = {name: [found.get(key, {}).get(name) for key in keys] for name in FLOOR_COLUMNS}
    return summary.assign(**pd.DataFrame(values, index=summary.index, dtype="float64"))


def _row(plan: CasePlan, costs: Costs, own: pd.DataFrame, gemm: pd.DataFrame, read: pd.DataFrame) -> dict[str, Any]:
    flop_per_s, bytes_per_s = gemm["per_s"].median(), read["per_s"].median()
    compute_ms = costs.flops / costs.forward_calls / flop_per_s * 1000
    memory_ms = costs.bytes / costs.forward_calls / bytes_per_s * 1000
    row = {
        "gemm_flop_per_s": flop_per_s,
        "read_bytes_per_s": bytes_per_s,
        "compute_floor_ms": compute_ms,
        "memory_floor_ms": memory_ms,
        "bound": bound(compute_ms, memory_ms, float(own["latency_ms"].median())),
        **_share("mfu", costs.flops, own, gemm),
    }
    caches_bytes = CACHES * read["cache_bytes"].max()
    if plan.weights_bytes is not None and plan.weights_bytes > caches_bytes:
        row |= _share("mbu", costs.bytes, own, read)
    return row


def bound(compute_ms: float, memory_ms: float, latency_ms: float) -> str:
    """What a forward is bound by: the larger floor's roof, or overhead where that floor is under half its time.

    >>> bound(10, 40, 50), bound(40, 10, 50), bound(10, 20, 50)
    ('memory', 'compute', 'overhead')
    """
    if max(compute_ms, memory_ms) < OVERHEAD_SHARE * latency_ms:
        return "overhead"
    return "compute" if compute_ms >= memory_ms else "memory"


def _share(name: str, amount: int, own: pd.DataFrame, roof: pd.DataFrame) -> dict[str, float | None]:
    """The case's rate as a share of the roof beside it, `amount` being that of the whole phase."""
    ratio = round_pairs.ratio(own.assign(per_s=amount / own["total_ms"] * 1000), beside(own, roof), "per_s")
    if ratio is None:
        return {}
    return {name: ratio.estimate, f"{name}_low": ratio.low, f"{name}_high": ratio.high}


def beside(own: pd.DataFrame, roof: pd.DataFrame) -> pd.DataFrame:
    """`roof` with a row for each turn of `own` that has any of it in its round.

    `per_s` is the geometric mean of the turns nearest before and after, where the round has both.
    """
    by = ["process", "round"]
    turns = own[[*by, "order"]].sort_values("order")
    found = roof[[*by, "order", "per_s"]].sort_values("order")
    before, after = (
        np.log(pd.merge_asof(turns, found, on="order", by=by, direction=side)["per_s"])
        for side in ("backward", "forward")
    )
    logs = pd.concat([before, after], axis="columns").mean(axis="columns")  # of the one there is, where one is missing
    return turns.assign(per_s=np.exp(logs).to_numpy()).dropna()
