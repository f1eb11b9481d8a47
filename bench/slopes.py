"""How much longer a decode step takes per token that lies before it: the slope of latency against position."""

from __future__ import annotations

from typing import Any

import pandas as pd
from scipy import stats

from bench import estimators, rounds

CURVE_COLUMNS: list[str] = [
    "model",
    "strategy",
    "naive_logits",
    "device",
    "dtype",
    "attn_implementation",
    "n_threads",
    "batch_size",
]
"""What the points of one curve have in common; they come from every context length of the run."""

SLOPE_COLUMNS: list[str] = [
    *CURVE_COLUMNS,
    "slope_ms_per_1000_tokens",
    "slope_low",
    "slope_high",
    "intercept_ms",
    "samples",
    "first_position",
    "last_position",
]

MAX_POINTS = 600
"""Points of one fit, which looks at every pair of them."""


def slopes(steps: pd.DataFrame) -> pd.DataFrame:
    """One row per curve: the fitted slope of step latency against position, in ms per 1,000 tokens, and its interval.

    `steps` are `bench.rounds.usable_steps`. Each time that the strategy went through all its context lengths gives one
    line (Theil-Sen: the median of the slopes between every two steps, which a stall moves little); the slope is the
    median of these, with its exact interval, so there is none below six rounds. Turns are resampled, not steps, because
    the steps of a turn are slow or fast together: simulated with a spread of 3 % between turns, the interval of
    `scipy.stats.theilslopes` over pooled medians held the true slope in 26 % of the runs, this one in 97 %. Neither
    sees a machine that changes its speed between one context length and the next.

    A curve with a single position has no row.
    """
    rows: list[dict[str, Any]] = []
    for key, curve in steps.groupby(CURVE_COLUMNS, sort=False):
        fits = _fits(curve)
        if fits.empty:
            continue
        slope, low, high = estimators.median_interval(rounds.independent_values(fits, "slope"))
        rows.append(
            {
                **dict(zip(CURVE_COLUMNS, key, strict=True)),
                "slope_ms_per_1000_tokens": slope,
                "slope_low": low,
                "slope_high": high,
                "intercept_ms": fits["intercept"].median(),
                "samples": len(fits),
                "first_position": curve["position"].min(),
                "last_position": curve["position"].max(),
            }
        )
    floats = ["slope_ms_per_1000_tokens", "slope_low", "slope_high", "intercept_ms"]
    return pd.DataFrame(rows, columns=SLOPE_COLUMNS).astype(dict.fromkeys(floats, "float64"))


def _fits(curve: pd.DataFrame) -> pd.DataFrame:
    """One line per process and pass: columns process, slope (ms per 1,000 tokens) and intercept (ms).

    A pass is the first, second, ... turn of every case of the curve, by rank and not by round number: cells are
    measured one after the other and an interrupted round is left out of its own cell alone. Unfinished passes are no
    line, since they lack a context length.
    """
    rank = curve.groupby(["case", "process"])["round"].rank(method="dense").rename("pass")
    n_cases = curve["case"].nunique()
    fits: list[dict[str, Any]] = []
    for (process, _), points in curve.groupby(["process", rank]):
        if points["case"].nunique() < n_cases or points["position"].nunique() < 2:
            continue
        thinned = points.sort_values("position").iloc[:: -(-len(points) // MAX_POINTS)]
        line = stats.theilslopes(thinned["latency_ms"], thinned["position"] / 1000)
        fits.append({"process": process, "slope": float(line.slope), "intercept": float(line.intercept)})
    return pd.DataFrame(fits, columns=["process", "slope", "intercept"])
