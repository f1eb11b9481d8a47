"""Where does a kind of cache begin to pay: the context from which on its decode step is faster than the exact one's."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """The last context within what was measured at which a strategy becomes faster or slower than the exact one."""

    tokens: float | None
    """None: one of the two is faster at every context."""
    low: float | None = None
    """Lower end of the 95 % interval; None: below the shortest context, or not known."""
    high: float | None = None
    faster_beyond: bool
    """Whether the strategy is faster at the longest context."""


def crossing(contexts: Sequence[int], rows: pd.DataFrame) -> Crossing:
    """Find where the latencies of a strategy and of its exact one meet, between the contexts that were measured.

    `rows` of the summary, one for each of the rising `contexts`, with `latency_ms` and `latency_vs_exact`. A step's
    time grows in a straight line with the context, so the difference in time is interpolated so. The interval is
    where the intervals of the paired ratios allow a crossing.
    """
    exact_ms = rows["latency_ms"] / rows["latency_vs_exact"]
    cost, low, high = (list(exact_ms * (rows[f"latency_vs_exact{end}"] - 1)) for end in ("", "_low", "_high"))
    met = _changes(contexts, cost)
    if not met:
        return Crossing(tokens=None, faster_beyond=cost[-1] < 0)
    at, falling = met[-1]
    earlier, later = (low, high) if falling else (high, low)
    before = [tokens for tokens, falls in _changes(contexts, earlier) if falls == falling and tokens <= at]
    after = [tokens for tokens, falls in _changes(contexts, later) if falls == falling and tokens >= at]
    return Crossing(
        tokens=at,
        low=max(before, default=None),
        high=min(after, default=None),
        faster_beyond=falling,
    )


def _changes(x: Sequence[int], y: Sequence[float]) -> list[tuple[float, bool]]:
    """Find where the line through the points crosses zero, and whether it falls there; NaN crosses nothing."""
    return [
        (x[i] + (x[i + 1] - x[i]) * y[i] / (y[i] - y[i + 1]), y[i] > 0)
        for i in range(len(y) - 1)
        if (y[i] > 0) != (y[i + 1] > 0) and y[i] == y[i] and y[i + 1] == y[i + 1]
    ]
