"""The estimators: plain values -> median, ratio, and intervals that are exact up to 200 values (`EXACT`).

Tables, compare, gate and ab all use these and no others. Values are times (any one unit) or other positive figures.
"""

import functools
import itertools
import math
from collections.abc import Iterable
from statistics import NormalDist

import msgspec
import numpy as np

from bench.analysis.pairwise import Floats, kth_sum

LEVEL = 0.95
"""Confidence of every interval that is shown."""

EXACT = 200
"""Of samples that are larger the distribution of a rank statistic is taken as normal, and of the pairwise ratios only
those are made that are needed: the ends of the interval move by less than 0.1 %, or by one step of a coarse clock."""


class Ratio(msgspec.Struct, frozen=True, kw_only=True):
    """A ratio of two sets of times with its interval; `low` and `high` are None where the sample is too small."""

    estimate: float
    low: float | None
    high: float | None


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
    rank = int(np.searchsorted(_binomial(len(array)), (1 - level) / 2))
    low, high = (float(array[rank - 1]), float(array[-rank])) if rank else (None, None)
    return middle(array), low, high


@functools.lru_cache(maxsize=EXACT)
def _binomial(n: int) -> Floats:
    """Return the probabilities of at most 0, 1, ... n - 1 heads in n throws of a coin."""
    if n > EXACT:
        from scipy import special  # its import is a quarter of the time of a small run's table, which needs none

        return np.asarray(special.bdtr(np.arange(n), n, 0.5))
    return np.array([count / 2**n for count in itertools.accumulate(math.comb(n, k) for k in range(n))])


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
    logs = np.sort(np.log(above) - np.log(below))
    n = len(logs)
    if n > EXACT:
        n_sums = n * (n + 1) // 2
        rank = _normal_rank(n_sums / 2, n * (n + 1) * (2 * n + 1) / 24, level)
        ranks = ((n_sums + 1) // 2, rank, n_sums - rank + 1)
        estimate, low, high = (math.exp(kth_sum(logs, logs, k, triangle=True) / 2) for k in ranks)
        return Ratio(estimate=estimate, low=low, high=high)
    first, second = _pairs(n)
    walsh_averages = np.sort((logs[first] + logs[second]) / 2)
    return _ratio(walsh_averages, _critical_rank(signed_rank_distribution(n), level))


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
    estimate, (m, n) = middle(np.sort(above)) / middle(np.sort(below)), (len(above), len(below))
    if max(m, n) > EXACT:
        rank = _normal_rank(m * n / 2, m * n * (m + n + 1) / 12, level)
        logs = np.sort(np.log(above)), np.sort(-np.log(below))
        ends = [math.exp(kth_sum(*logs, k)) for k in (rank, m * n - rank + 1)] if rank else None
    else:
        differences = np.sort(np.subtract.outer(np.log(above), np.log(below)).ravel())
        ratio = _ratio(differences, _critical_rank(_mann_whitney_distribution(m, n), level))
        ends = None if ratio.low is None or ratio.high is None else [ratio.low, ratio.high]
    low, high = (None, None) if ends is None else (min(ends[0], estimate), max(ends[1], estimate))
    return Ratio(estimate=estimate, low=low, high=high)


_pairs = functools.lru_cache(maxsize=8)(np.triu_indices)
"""Each pair of `n` values, and each value with itself, by their places."""


@functools.cache
def signed_rank_distribution(n: int) -> Floats:
    """Compute the probability of each value 0 .. n (n + 1) / 2 of the signed-rank statistic of `n` values.

    Each rank is in or out by a coin.
    """
    chances = np.ones(1)
    for rank in range(1, n + 1):
        chances = (np.pad(chances, (0, rank)) + np.pad(chances, (rank, 0))) / 2
    return chances


def middle(ordered: Floats) -> float:
    """Return the median of values in order; numpy's own takes several times as long where they are few."""
    half = len(ordered) // 2
    return float(ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2)


def _finite(values: Iterable[float]) -> Floats:
    array = np.asarray(values if isinstance(values, np.ndarray) else list(values), dtype=np.float64)
    if array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"need finite values, got {array.tolist()}")
    return array


def _positive(values: Iterable[float]) -> Floats:
    array = _finite(values)
    if (array <= 0).any():
        raise ValueError(f"a ratio needs positive values, got {array.tolist()}")
    return array


def _ratio(logs: Floats, rank: int) -> Ratio:
    """Take from all sorted pairwise logs their median, and the `rank`-th from either end (0: no interval)."""
    low, high = (math.exp(logs[rank - 1]), math.exp(logs[-rank])) if rank else (None, None)
    return Ratio(estimate=math.exp(middle(logs)), low=low, high=high)


def _critical_rank(distribution: Floats, level: float) -> int:
    """Count the smallest values of the statistic that are together no likelier than the lower tail of `level`."""
    return int(np.searchsorted(np.cumsum(distribution), (1 - level) / 2, side="right"))


def _normal_rank(mean: float, variance: float, level: float) -> int:
    """Return what `_critical_rank` does of a statistic of whole numbers that is all but normal; corrected for them."""
    return max(0, math.floor(mean + NormalDist().inv_cdf((1 - level) / 2) * math.sqrt(variance) - 0.5) + 1)


@functools.cache
def _mann_whitney_distribution(m: int, n: int) -> Floats:
    """Compute the probability of 0 .. m n / 2 of the Mann-Whitney statistic (Harding 1984, Appl. Statist. 33, 1-6).

    The generating function is the product over i of i (1 - q^(n + i)) / ((n + i) (1 - q^i)). Its lower half rises, so
    no difference of two terms loses digits.
    """
    chances = np.zeros(m * n // 2 + 1)
    chances[0] = 1.0
    for i in range(1, m + 1):
        chances[n + i :] -= chances[: -n - i].copy() if n + i < len(chances) else 0
        padded = np.pad(chances, (0, -len(chances) % i)).reshape(-1, i)
        chances = np.cumsum(padded, axis=0).ravel()[: len(chances)] * (i / (n + i))
    return chances
