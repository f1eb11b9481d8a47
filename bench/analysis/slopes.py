"""How much longer a decode step takes per token that lies before it: the slope of latency against position."""

from __future__ import annotations

from typing import Any

import pandas as pd
from scipy import stats

from bench.analysis import estimators
from bench.analysis.tidy import independent_values

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

_SLOPE: list[str] = ["slope_ms_per_1000_tokens", "slope_low", "slope_high"]

SLOPE_COLUMNS: list[str] = [*CURVE_COLUMNS, *_SLOPE, "intercept_ms", "samples", "first_position", "last_position"]

MAX_POINTS = 600
"""Points of one fit, which looks at every pair of them."""


MIN_POSITIONS = 4
MIN_SPAN = 16
MIN_SPAN_SHARE = 0.1
"""A curve with fewer positions, or whose positions lie closer together (in tokens, and as a share of the last one), has
no slope: the noise of its steps, stretched to 1,000 tokens, would be told as a figure."""


def slopes(steps: pd.DataFrame) -> pd.DataFrame:
    """One row per curve: the fitted slope of step latency against position, in ms per 1,000 tokens, and its interval.

    `steps` are as `Tidy.steps` has them. Each time that the strategy went through all its context
    lengths gives one line (Theil-Sen: the median of the slopes between every two steps, which a stall moves little);
    the slope is the
    median of these, with its exact interval, so there is none below six rounds. Turns are resampled, not steps, because
    the steps of a turn are slow or fast together: simulated with a spread of 3 % between turns, the interval of
    `scipy.stats.theilslopes` over pooled medians held the true slope in 26 % of the runs, this one in 97 %. Neither
    sees a machine that changes its speed between one context length and the next.

    A curve whose positions are too few or too close has a row without a slope; one without decode steps has none.
    """
    rows: list[dict[str, Any]] = []
    for key, curve in steps.groupby(CURVE_COLUMNS, sort=False):
        enough = _positions_suffice(curve["position"])
        fits = _fits(curve) if enough else _NO_FITS
        if enough and fits.empty:  # every pass was torn
            continue
        slope: tuple[float | None, ...] = (None, None, None)
        if enough:
            slope = estimators.median_interval(independent_values(fits, "slope"))
        rows.append(
            {
                **dict(zip(CURVE_COLUMNS, key, strict=True)),
                **dict(zip(_SLOPE, slope, strict=True)),
                "intercept_ms": fits["intercept"].median(),
                "samples": len(fits),
                "first_position": curve["position"].min(),
                "last_position": curve["position"].max(),
            }
        )
    return pd.DataFrame(rows, columns=SLOPE_COLUMNS).astype(dict.fromkeys([*_SLOPE, "intercept_ms"], "float64"))


_NO_FITS = pd.DataFrame(columns=["process", "slope", "intercept"])


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
        if points["case"].nunique() < n_cases:
            continue
        thinned = points.sort_values("position").iloc[:: -(-len(points) // MAX_POINTS)]
        line = stats.theilslopes(thinned["latency_ms"], thinned["position"] / 1000)
        fits.append({"process": process, "slope": float(line.slope), "intercept": float(line.intercept)})
    return pd.DataFrame(fits, columns=_NO_FITS.columns)


def _positions_suffice(positions: pd.Series[int]) -> bool:
    span = positions.max() - positions.min()
    return bool(positions.nunique() >= MIN_POSITIONS and span >= max(MIN_SPAN, MIN_SPAN_SHARE * positions.max()))
