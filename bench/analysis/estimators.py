"""The estimators: plain values -> median, ratio, and intervals that are exact for small samples.

Tables, compare, gate and ab all use these and no others. Values are times (any one unit) or other positive figures.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy import special

Floats = NDArray[np.float64]

LEVEL = 0.95
"""Confidence of every interval that is shown."""


class Ratio(msgspec.Struct, frozen=True, kw_only=True):
    """A ratio of two sets of times with its interval; `low` and `high` are None where the sample is too small."""

    estimate: float
    low: float | None
    high: float | None
    n: int
    """Pairs; for an unpaired ratio the size of the smaller sample."""
    paired: bool


def median_interval(values: Iterable[float], level: float = LEVEL) -> tuple[float, float | None, float | None]:
    """Return the median and its interval by order statistics; the interval is None below six values at 95 %.

    The interval is that of the binomial test (Conover 1999, section 3.2): it holds for any distribution. Six values
    give their smallest and largest, at 96.9 %.

    Raises:
        ValueError: there is no value, or one is not finite.

    >>> median_interval([40.1, 40.3, 39.9, 41.0, 40.2, 40.0])
    (40.150000000000006, 39.9, 41.0)
    """
    array = np.sort(_finite(values))
    below = special.bdtr(np.arange(len(array)), len(array), 0.5)  # scipy.stats would be half of a report's imports
    rank = int(np.searchsorted(below, (1 - level) / 2))
    low, high = (float(array[rank - 1]), float(array[-rank])) if rank else (None, None)
    return float(np.median(array)), low, high


def paired_ratio(a: Iterable[float], b: Iterable[float], level: float = LEVEL) -> Ratio:
    """Estimate `a / b` where `a[i]` and `b[i]` are of the same round; no interval below six pairs at 95 %.

    The exponent of the Hodges-Lehmann estimate of the log ratios (the median of their Walsh averages), with the
    interval that inverts the exact signed-rank test (Hollander, Wolfe & Chicken 2014, section 3.3).

    Raises:
        ValueError: the two have different lengths, are empty, or hold a value that is not finite and positive.
    """
    above, below = _positive(a), _positive(b)
    if len(above) != len(below):
        raise ValueError(f"a paired ratio needs pairs, got {len(above)} and {len(below)} values")
    logs = np.log(above) - np.log(below)
    first, second = np.triu_indices(len(logs))
    walsh_averages = np.sort((logs[first] + logs[second]) / 2)
    rank = _critical_rank(signed_rank_distribution(len(logs)), level)
    return _ratio(walsh_averages, rank, n=len(logs), paired=True)


def unpaired_ratio(a: Iterable[float], b: Iterable[float], level: float = LEVEL) -> Ratio:
    """Estimate `a / b` of values measured at different times; no interval below, for example, four and four values.

    The estimate is the ratio of the two medians, so that it agrees with them where they stand beside it (their
    Hodges-Lehmann shift need not: where each sample has two clusters, it can be on the other side of one). The interval
    inverts the exact Mann-Whitney test (Hollander, Wolfe & Chicken 2014, section 4.3), and is widened to hold the
    estimate where it does not. It knows nothing of a machine that became faster or slower between the two: that is in
    the ratio.

    Raises:
        ValueError: one is empty, or holds a value that is not finite and positive.
    """
    above, below = _positive(a), _positive(b)
    differences = np.sort(np.subtract.outer(np.log(above), np.log(below)).ravel())
    rank = _critical_rank(_mann_whitney_distribution(len(above), len(below)), level)
    ratio = _ratio(differences, rank, n=min(len(above), len(below)), paired=False)
    estimate = float(np.median(above) / np.median(below))
    low = None if ratio.low is None else min(ratio.low, estimate)
    high = None if ratio.high is None else max(ratio.high, estimate)
    return msgspec.structs.replace(ratio, estimate=estimate, low=low, high=high)


@functools.cache
def signed_rank_distribution(n: int) -> Floats:
    """Compute the probability of each value 0 .. n (n + 1) / 2 of the signed-rank statistic of `n` values.

    Each rank is in or out by a coin.
    """
    chances = np.ones(1)
    for rank in range(1, n + 1):
        chances = (np.pad(chances, (0, rank)) + np.pad(chances, (rank, 0))) / 2
    return chances


def _finite(values: Iterable[float]) -> Floats:
    array = np.asarray(list(values), dtype=np.float64)
    if array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"need finite values, got {array.tolist()}")
    return array


def _positive(values: Iterable[float]) -> Floats:
    array = _finite(values)
    if (array <= 0).any():
        raise ValueError(f"a ratio needs positive values, got {array.tolist()}")
    return array


def _ratio(logs: Floats, rank: int, *, n: int, paired: bool) -> Ratio:
    """From all sorted pairwise logs: their median, and the `rank`-th from either end (0: no interval)."""
    low, high = (math.exp(logs[rank - 1]), math.exp(logs[-rank])) if rank else (None, None)
    return Ratio(estimate=math.exp(np.median(logs)), low=low, high=high, n=n, paired=paired)


def _critical_rank(distribution: Floats, level: float) -> int:
    """How many of the smallest values of the statistic are together no likelier than the lower tail of `level`."""
    return int(np.searchsorted(np.cumsum(distribution), (1 - level) / 2, side="right"))


@functools.cache
def _mann_whitney_distribution(m: int, n: int) -> Floats:
    """Probability of each value 0 .. m n of the Mann-Whitney statistic (Harding 1984, Appl. Statist. 33, 1-6)."""
    counts = [1] + [0] * (m * n)
    for i in range(1, m + 1):
        for value in range(m * n, n + i - 1, -1):
            counts[value] -= counts[value - n - i]
        for value in range(i, m * n + 1):
            counts[value] += counts[value - i]
    total = math.comb(m + n, m)
    return np.array([count / total for count in counts])
