"""Each case against the machine's roofs: MFU, MBU, the limiting resource, and what costs and roofs predict for it.

The roofline model (Williams, Waterman & Patterson, CACM 52(4), 2009): a forward takes at least its FLOPs at the GEMM
rate, and at least its bytes at the bandwidth of reading so many. Both roofs are those measured in the rounds of the
case itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bench.analysis.estimators import middle
from bench.analysis.pairwise import Floats
from bench.analysis.tidy import Columns, Tidy, grouped, paired_columns
from bench.manifest import CasePlan
from bench.record import MOST_READ_BYTES, MOST_READ_CACHES, CeilingSample, Run
from bench.turns import Ints, Turns
from kvcache.arithmetic.costs import Costs
from kvcache.strategies.catalogue import OWN

CACHES = 2
"""In runs of before the read was as large as the case's own (`CeilingTimes.read_bytes`), MBU is empty for weights of at
most so many last-level caches: part of them is read from there, not from memory."""

OVERHEAD_SHARE = 0.5
"""Where both floors are under this share of the measured time, neither roof binds: the rest is overhead."""

FLOOR_COLUMNS: list[str] = ["compute_floor_ms", "memory_floor_ms", "gemm_flop_per_s", "read_bytes_per_s"]
"""A forward's floors and the medians of the roofs they come from: no columns of the summary, but plots draw them."""
NOTE_COLUMNS: dict[str, str] = {"read_bytes": "Int64", "read_limit": "string", "no_share": "string"}
"""Nor are these, with their types: how much the roof of `mbu` reads, what limited it where a step reads more, and why a
share is empty. Footnotes say so."""

PRIOR_WEIGHT = 0.03
"""Weight of the expectation that both roofs are reached and nothing is added, against one measured case: a forward
repeats within some 3 %, while a share of the roof may be anything. It only decides what the other cases leave open."""


MANY = 64
"""Of so many points the fits without one of them are found from the sums of the fit with all: to a part in 10^5."""


class Point(NamedTuple):
    """One case and phase, in milliseconds per forward: its two floors, and the measured median."""

    compute_ms: float
    memory_ms: float
    latency_ms: float


def columns(tidy: Tidy) -> dict[tuple[str, str], dict[str, Any]]:
    """Compute, by case key and phase: mfu, mbu, their intervals, bound, predicted_ms, `FLOOR_COLUMNS`, `NOTE_COLUMNS`.

    A case without times has no entry. One without costs or ceilings measured beside it has only `no_share`, and so has
    a user's own cache.
    """
    sizes = {"cache_bytes": 0, "read_bytes": 0}
    roofs = grouped(tidy.ceilings.fillna(sizes), ["cell", "ceiling"], [*_ROOF, *sizes])
    found: dict[tuple[str, str], dict[str, Any]] = {}
    curves: dict[tuple[object, ...], dict[tuple[str, str], Point]] = {}
    wanted: dict[str, int] = {}
    for plan in tidy.run.manifest.plan:
        cell = plan.case.cell.key
        wanted[cell] = max(plan.step_bytes, wanted.get(cell, 0))
    for plan in tidy.run.manifest.plan:
        cell = plan.case.cell.key
        gemm, read = roofs.get((cell, "gemm")), roofs.get((cell, "read_bandwidth"))
        for phase, costs in (("prefill", plan.prefill), ("decode", plan.decode)):
            key = (plan.case.key, phase)
            turns = tidy.by_case_and_phase.get(key)
            if turns is None:
                continue
            if costs is None or gemm is None or read is None or plan.case.strategy.startswith(OWN):
                found[key] = {"no_share": _why_no_share(tidy.run, plan, costs)}
                continue
            found[key] = _row(plan, costs, turns, gemm, read) | _limit(read, wanted[cell])
            floors = found[key]["compute_floor_ms"], found[key]["memory_floor_ms"]
            point = Point(*floors, middle(np.sort(turns["latency_ms"])))
            machine = tidy.run.environment(plan.case).machine
            curves.setdefault((plan.case.group, plan.case.strategy, phase, machine), {})[key] = point
    for points in curves.values():
        for key, predicted_ms in zip(points, leave_one_out(list(points.values())), strict=True):
            found[key]["predicted_ms"] = predicted_ms
    return found


def leave_one_out(points: Sequence[Point]) -> list[float | None]:
    """Predict each of `points` (of one strategy, phase and group) from the others, in ms; None for one alone."""
    table = np.array(points)
    if len(points) > MANY:
        return _leave_one_out_of_many(table)
    return [
        predict(point, np.delete(table, number, axis=0)) if len(points) > 1 else None
        for number, point in enumerate(points)
    ]


def predict(point: Point, others: Sequence[Point] | Floats) -> float:
    """Compute `a x compute floor + b x memory floor + c`; a, b, c fit `others` by least squares of relative errors.

    1 / a and 1 / b are the shares of the roofs that the strategy reaches, c is its overhead per forward, in ms; none is
    negative. The sum, and not the larger floor: products and attention follow each other and do not overlap.
    """
    table = np.asarray(others)
    measured = table[:, 2]
    typical_ms = float(np.median(measured))
    terms = np.column_stack([table[:, 0], table[:, 1], np.full(len(table), typical_ms)]) / measured[:, None]
    expected = np.array([1.0, 1.0, 0.0])
    a, b, c = _fit(
        np.vstack([terms, PRIOR_WEIGHT * np.eye(3)]),
        np.concatenate([np.ones(len(table)), PRIOR_WEIGHT * expected]),
    )
    return float(a * point.compute_ms + b * point.memory_ms + c * typical_ms)


def _leave_one_out_of_many(table: Floats) -> list[float | None]:
    """Predict each row as `predict` does: its share of the normal equations is taken off those of all rows."""
    measured = table[:, 2]
    terms = np.column_stack([table[:, :2], np.ones(len(table))]) / measured[:, None]
    squares, sums = terms.T @ terms, terms.sum(axis=0)
    predicted: list[float | None] = []
    for number, (compute_ms, memory_ms, _) in enumerate(table):
        typical_ms = float(np.median(np.delete(measured, number)))
        scale = np.array([1.0, 1.0, typical_ms])
        left = scale[:, None] * (squares - np.outer(terms[number], terms[number])) * scale + PRIOR_WEIGHT**2 * np.eye(3)
        right = scale * (sums - terms[number]) + PRIOR_WEIGHT**2 * np.array([1.0, 1.0, 0.0])
        lower = np.linalg.cholesky(left)
        fit = _fit(lower.T, np.linalg.solve(lower, right))
        predicted.append(float(fit @ (compute_ms, memory_ms, typical_ms)))
    return predicted


def _fit(terms: Floats, target: Floats) -> Floats:
    """Solve least squares with no negative unknown: the best of the solutions that leave some unknowns at 0.

    scipy.optimize.nnls does it too, but its import takes half a second, and the table of a small run may take 1.5 s.
    """
    n_unknowns = terms.shape[1]
    best, least = np.zeros(n_unknowns), float(target @ target)
    for size in range(n_unknowns, 0, -1):
        for kept in map(list, itertools.combinations(range(n_unknowns), size)):
            fit = np.zeros(n_unknowns)
            fit[kept] = np.linalg.lstsq(terms[:, kept], target, rcond=None)[0]
            if (fit < 0).any():
                continue
            if size == n_unknowns:
                return fit
            error = float(np.sum((terms @ fit - target) ** 2))
            if error < least:
                best, least = fit, error
    return best


def _row(plan: CasePlan, costs: Costs, own: Columns, gemm: Columns, read: Columns) -> dict[str, Any]:
    flop_per_s, bytes_per_s = (middle(np.sort(roof["per_s"])) for roof in (gemm, read))
    compute_ms = costs.flops / costs.forward_calls / flop_per_s * 1000
    memory_ms = costs.bytes / costs.forward_calls / bytes_per_s * 1000
    row = {
        "gemm_flop_per_s": flop_per_s,
        "read_bytes_per_s": bytes_per_s,
        "compute_floor_ms": compute_ms,
        "memory_floor_ms": memory_ms,
        "bound": bound(compute_ms, memory_ms, middle(np.sort(own["latency_ms"]))),
        **_share("mfu", costs.flops, own, gemm),
    }
    read_bytes, cache_bytes = int(read["read_bytes"].max()), int(read["cache_bytes"].max())
    if read_bytes:
        row["read_bytes"] = read_bytes
    elif plan.weights_bytes <= CACHES * cache_bytes:
        return row | {
            "no_share": f"its weights are under twice the last-level cache ({cache_bytes / 1e6:.0f} MB), and the "
            "ceiling of this older run is that of reading more than it holds"
        }
    row |= _share("mbu", costs.bytes, own, read)
    if "mfu" not in row or "mbu" not in row:
        row["no_share"] = "no turn of the ceilings was in one of its rounds"
    return row


def _limit(read: Columns, wanted: int) -> dict[str, str]:
    """Say what limited the read of a cell, whose largest step reads `wanted` bytes, where it went through fewer."""
    read_bytes, caches_bytes = int(read["read_bytes"].min()), MOST_READ_CACHES * int(read["cache_bytes"].max())
    if not 0 < read_bytes < wanted:
        return {}
    if read_bytes < max(MOST_READ_BYTES, caches_bytes):
        return {"read_limit": "half the free memory"}
    return {"read_limit": "2 GiB" if caches_bytes <= MOST_READ_BYTES else "four last-level caches"}


def _why_no_share(run: Run, plan: CasePlan, costs: Costs | None) -> str:
    """Say why a measured case is held against no roof."""
    start = run.starts.get(plan.case.cell.key)
    if plan.case.strategy.startswith(OWN):
        return "what a user's own cache reads is not known"
    if run.manifest.origin is not None:
        return f"{run.manifest.origin.tool} measures no ceilings"
    if costs is None:
        return "no FLOPs and bytes are predicted" + (f": {plan.unpredicted}" if plan.unpredicted else "")
    if plan.case.cell.key in Turns.of(CeilingSample, run.ceilings).coded("cell").distinct:
        return "every turn of the ceilings beside it was disturbed"
    if run.manifest.ceilings if start is None else start.ceilings:
        return "no ceilings were measured beside it: their worker failed, the run's messages said why"
    return "the run measured no ceilings (--no-ceilings, or they failed at its start)"


def bound(compute_ms: float, memory_ms: float, latency_ms: float) -> str:
    """Name the limiting resource of a forward: that of the larger floor; overhead where it is under half the time.

    >>> bound(10, 40, 50), bound(40, 10, 50), bound(10, 20, 50)
    ('memory', 'compute', 'overhead')
    """
    if max(compute_ms, memory_ms) < OVERHEAD_SHARE * latency_ms:
        return "overhead"
    return "compute" if compute_ms >= memory_ms else "memory"


def _share(name: str, amount: int, own: Columns, roof: Columns) -> dict[str, float | None]:
    """Compute the case's rate as a share of the roof beside it, `amount` being that of the whole phase."""
    rates = {**own, "per_s": amount / own["total_ms"] * 1000}
    return paired_columns([name, f"{name}_low", f"{name}_high"], rates, beside(own, roof), "per_s")


_ROOF = ["process", "round", "order", "per_s"]


def beside(own: Columns, roof: Columns) -> dict[str, NDArray[Any]]:
    """Take the rate of `roof` beside each turn of `own` that has any of it in its round: columns `_ROOF`, in order.

    `per_s` is the geometric mean of the turns nearest before and after, where the round has both.
    """
    first = np.argsort(own["order"], kind="stable")
    turns, taken = _moments(own)[first], _moments(roof)
    order = np.argsort(taken, kind="stable")
    logs, taken = np.log(roof["per_s"][order]), taken[order]
    near = []
    for places in (np.searchsorted(taken, turns, "right") - 1, np.searchsorted(taken, turns, "left")):
        inside = np.clip(places, 0, len(taken) - 1)
        same = (places == inside) & (taken[inside] >> _ORDER_BITS == turns >> _ORDER_BITS)
        near.append(np.where(same, logs[inside], np.nan))
    before, after = near
    mean = np.where(np.isnan(before), after, np.where(np.isnan(after), before, (before + after) / 2))
    known = ~np.isnan(mean)
    return {name: own[name][first][known] for name in _ROOF[:3]} | {"per_s": np.exp(mean[known])}


_ORDER_BITS, _ROUND_BITS = 30, 22
"""Of a number that has process, round and order of a turn side by side."""


def _moments(turns: Columns) -> Ints:
    """Return a number for each turn, by which those of a process and round lie together, in their order."""
    moments: Ints = (((turns["process"] << _ROUND_BITS) + turns["round"]) << _ORDER_BITS) + turns["order"]
    return moments
