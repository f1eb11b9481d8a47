"""How much longer a decode step takes per token that lies before it: the slope of latency against position."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from bench.analysis import estimators
from bench.analysis.frames import CASE_COLUMNS
from bench.analysis.pairwise import Floats
from bench.analysis.tidy import independent_values
from kvcache.strategies.catalogue import REFEEDING

CURVE_COLUMNS: list[str] = [
    *(name for name in CASE_COLUMNS if name not in ("n_prompt", "n_gen", "n_depth", "seed")),
    "machine",
]
"""What the points of one curve have in common; they come from every context length of the run."""

_SLOPE: list[str] = ["slope_ms_per_1000_tokens", "slope_low", "slope_high"]
_FIT: list[str] = ["slope_at", "curvature_ms", "intercept_ms", "samples", "first_position", "last_position"]
SLOPE_COLUMNS: list[str] = [*CURVE_COLUMNS, *_SLOPE, *_FIT]

MAX_POINTS = 600
"""Points of one fit, which looks at every pair of them."""


MIN_POSITIONS = 4
MIN_SPAN = 16
MIN_SPAN_SHARE = 0.1
"""A curve with fewer positions, or whose positions lie closer together (in tokens, and as a share of the last one), has
no slope: the noise of its steps, stretched to 1,000 tokens, would be read as a figure."""


STALL = 0.05
"""A step that lies so far from its curve, as a share of it, begins to count less (the scale of Cauchy's loss)."""
MAX_WEIGHINGS = 100
SETTLED = 1e-9
"""The curve of two weighings differs by less, as a share of each latency."""

MIN_REACH = 2
"""A parabola needs a last position of so many times the first: over less a bend is lost in the noise of the steps."""


def slopes(steps: pd.DataFrame) -> pd.DataFrame:
    """Fit one row per curve: the slope of step latency against position, in ms per 1,000 tokens, and its interval.

    `steps` are as `Tidy.steps` has them. A step from a cache takes a time that grows in a straight line, one that
    re-feeds the sequence a time that grows with its square (attention among all of its tokens): the latter's slope is
    that at its last position, `slope_at`, which is empty for a straight line (also where
    `MIN_REACH` is not met). With x = position / 1,000 the curve is
    `intercept_ms + b x + curvature_ms x^2`, whose slope at x is `b + 2 curvature_ms x`.

    Each time that the strategy went through all its context lengths gives one curve (a line by Theil-Sen, the median of
    the slopes between every two steps; a parabola by least squares that give way to stalls, Cauchy's loss); the slope
    is the median of these, with its exact interval, so there is none below six rounds. Turns are resampled, not steps,
    because the steps of a turn are slow or fast together: simulated with a spread of 3 % between turns, the interval of
    `scipy.stats.theilslopes` over pooled medians held the true slope in 26 % of the runs, this one in 97 %. Neither
    sees a machine that changes its speed between one context length and the next.

    A curve whose positions are too few or too close has a row without a slope; one without decode steps has none.
    """
    rows: list[tuple[object, ...]] = []
    for key, curve in steps.groupby(CURVE_COLUMNS, sort=False):
        first, last = curve["position"].min(), curve["position"].max()
        bends = curve["strategy"].iloc[0] in REFEEDING and last >= MIN_REACH * first
        enough = _positions_suffice(curve["position"])
        fits = _fits(curve, _parabola if bends else _line) if enough else _NO_FITS
        if enough and fits.empty:  # every pass was torn
            continue
        slope = (
            estimators.median_interval(
                independent_values({name: fits[name].to_numpy() for name in ("process", "slope")}, "slope")
            )
            if enough
            else (None, None, None)
        )
        at = last if bends and enough else None
        rows.append((*key, *slope, at, fits["curvature"].median(), fits["intercept"].median(), len(fits), first, last))
    types = dict.fromkeys([*_SLOPE, "curvature_ms", "intercept_ms"], "float64") | {"slope_at": "Int64"}
    return pd.DataFrame(rows, columns=SLOPE_COLUMNS).astype(types)


def latency_at(slope: pd.Series, positions: Floats) -> Floats:
    """Evaluate the curve of a row of `slopes` at some positions, in ms."""
    x, curvature = positions / 1000, slope["curvature_ms"]
    at = 0.0 if pd.isna(slope["slope_at"]) else slope["slope_at"] / 1000
    linear = slope["slope_ms_per_1000_tokens"] - 2 * curvature * at
    found: Floats = slope["intercept_ms"] + linear * x + curvature * x**2
    return found


_NO_FITS = pd.DataFrame(columns=["process", "slope", "curvature", "intercept"])

Fit = Callable[[Floats, Floats], tuple[float, float, float]]
"""x (positions / 1,000) and latencies in ms -> slope at the last x, curvature, intercept."""


def _fits(curve: pd.DataFrame, fit: Fit) -> pd.DataFrame:
    """Fit a curve per process and pass: columns process, slope, curvature and intercept (units as in `slopes`).

    A pass is the first, second, ... turn of every case of the curve, by rank and not by round number: cells are
    measured one after the other and an interrupted round is left out of its own cell alone. Unfinished passes are no
    curve, since they lack a context length.
    """
    rank = curve.groupby(["case", "process"])["round"].rank(method="dense").rename("pass")
    n_cases = curve["case"].nunique()
    fits: list[tuple[object, ...]] = []
    for (process, _), points in curve.groupby(["process", rank]):
        if points["case"].nunique() < n_cases:
            continue
        thinned = points.sort_values("position").iloc[:: -(-len(points) // MAX_POINTS)]
        x = thinned["position"].to_numpy(dtype=np.float64) / 1000
        fits.append((process, *fit(x, thinned["latency_ms"].to_numpy(dtype=np.float64))))
    return pd.DataFrame(fits, columns=_NO_FITS.columns)


def _line(x: Floats, latency_ms: Floats) -> tuple[float, float, float]:
    first, second = np.triu_indices(len(x), 1)
    apart = x[first] != x[second]
    slope = float(np.median((latency_ms[second] - latency_ms[first])[apart] / (x[second] - x[first])[apart]))
    return slope, 0.0, float(np.median(latency_ms) - slope * np.median(x))


def _parabola(x: Floats, latency_ms: Floats) -> tuple[float, float, float]:
    """Fit with residuals as shares of the latency: the short lengths count as much as the long ones.

    Cauchy's loss by weighted least squares, again and again: what `scipy.optimize.least_squares` finds (a test holds
    it against that), without an import that takes a tenth of a report's time.
    """
    terms = np.stack([np.ones_like(x), x, x**2], axis=1) / latency_ms[:, None]
    coefficients = np.linalg.lstsq(terms, np.ones_like(x), rcond=None)[0]
    for _ in range(MAX_WEIGHINGS):
        residuals = terms @ coefficients - 1
        root = 1 / np.sqrt(1 + (residuals / STALL) ** 2)
        coefficients = np.linalg.lstsq(terms * root[:, None], root, rcond=None)[0]
        if np.abs(terms @ coefficients - 1 - residuals).max() < SETTLED:
            break
    intercept, linear, curvature = (float(value) for value in coefficients)
    return linear + 2 * curvature * float(x.max()), curvature, intercept


def _positions_suffice(positions: pd.Series[int]) -> bool:
    span = positions.max() - positions.min()
    return bool(positions.nunique() >= MIN_POSITIONS and span >= max(MIN_SPAN, MIN_SPAN_SHARE * positions.max()))
