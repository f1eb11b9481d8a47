"""Decides when an A/B knows enough, from one figure per process pair, at stated error rates. Knows no clock.

A figure is the log of head's time / base's time in one pair of fresh processes, so a pair is the unit that varies
(address layout, allocator), and however many rounds lie within it, it counts once. Every quantity (a case's phase) goes
through the same looks:

1. Screening, `SCREENING_PAIRS` pairs of every case: what is shown to lie within the threshold is `same` and done.
2. Confirmation of the others in pairs of their own, `CONFIRMATION_LOOKS` of them so far at each look. A change is
   decided on these alone, so that what made a case suspicious is not evidence against it: one-sided tests, Holm over
   everything that was flagged, and the estimate must exceed the threshold. How far pairs scatter is not taken from
   screening either: a disturbance may begin after it.

The looks share the level equally (Bonferroni), so that looking often costs no more false alarms than are stated.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy import special

from bench.analysis.estimators import paired_ratio, signed_rank_distribution

ALPHA = 0.002
"""Chance that a run calls any of its cases a regression where none is one; the same again for `faster`. A fifth of the
one percent that is aimed for, since on a disturbed machine, where all is flagged, screening spares nothing of it."""

ALPHA_SAME = 0.05
"""Chance that a quantity whose change exceeds the threshold is called `same`."""

POWER = 0.95
"""With which `detectable` is found."""

SCREENING_PAIRS = 4
PAIRS_A_PROMPT = SCREENING_PAIRS
"""After so many pairs the prompts change, so that a change is confirmed on other prompts than those it was found on.
They do not change with every pair: making the reference of a long prompt takes a fifth of it."""

CONFIRMATION_LOOKS = (4, 6, 8, 12, 16, 20, 28, 40)
"""Even numbers: the sides take turns in being first, and what a drift does to the first of a pair cancels."""

TRIMMED_FROM, TRIMMED = 8, 0.2
"""Pairs from which a test of the mean without the outer fifths is made too, and the share that it leaves out at either
end: where one pair is an outlier, the t test of all of them finds nothing.

What it buys, as slow-downs of 5 % found with and without it, of 200 synthetic A/Bs of 24 pairs: no odd pairs 200/200,
5 % odd 195/180, 15 % 164/117, 30 % 96/57, and no false alarm of 200 either way; at 12 pairs it costs power (81/105)."""

TRIMMED_FACTOR = 2.5
"""Yuen's t rejects more often than its level says, so far out in the tail: of 2.4 million normal samples each of 8 to
40 pairs, up to 2.4 times at 5e-5. Its p-values are multiplied by this."""

RANKS_FROM = 10
"""Pairs from which the signed-rank test is made too. Tests share the level equally."""

FEWEST = 3
"""With fewer figures nothing is decided."""

Call = Literal["regression", "faster", "same"]
DIRECTIONS: dict[Call, int] = {"regression": 1, "faster": -1}


class LogRatios(NamedTuple):
    """Log ratios head / base of one quantity, one per process pair."""

    screening: tuple[float, ...]
    fresh: tuple[float, ...] = ()
    """Of confirmation, measured after the quantity was flagged."""


class Estimate(NamedTuple):
    """A change as a share of base's time, 0.05 being five percent slower."""

    effect: float
    low: float
    high: float
    detectable: float
    """The smallest slow-down that as many pairs with this scatter would have shown, in `POWER` of runs."""


def change_alpha(flagged: int) -> float:
    """Return the two-sided level of an interval that fits the test of one of `flagged` quantities at one look."""
    return 2 * ALPHA / len(CONFIRMATION_LOOKS) / flagged


def same_alpha(found: LogRatios) -> float:
    """Return the same for `same`: screening, where most cases end, has half of the level; the looks share the rest."""
    return ALPHA_SAME if not found.fresh else ALPHA_SAME / len(CONFIRMATION_LOOKS)


def screen(figures: Mapping[str, LogRatios], threshold: float) -> dict[str, Call]:
    """Call `same` what is shown to be so after screening; all the rest is flagged."""
    return {key: "same" for key, found in figures.items() if _is_same(found, threshold)}


def confirm(figures: Mapping[str, LogRatios], decided: Mapping[str, Call], threshold: float) -> dict[str, Call]:
    """Decide by one look at the flagged `figures`; `decided` are the calls of earlier looks."""
    calls: dict[str, Call] = {}
    for call, sign in DIRECTIONS.items():
        p_values = {
            key: (0.0 if decided.get(key) == call else 1.0) if key in decided else p_value(found.fresh, sign)
            for key, found in figures.items()
        }
        for key in _holm(p_values, ALPHA / len(CONFIRMATION_LOOKS)):
            found = figures[key]
            beyond = sign * _center(found.fresh) > math.log1p(threshold)
            if key not in decided and beyond and sign * float(np.median(found.screening or 0)) > 0:
                calls[key] = call
    for key, found in figures.items():
        if key not in decided and key not in calls and _is_same(found, threshold):
            calls[key] = "same"
    return calls


@functools.lru_cache(maxsize=1024)  # earlier looks are made again whenever a standing is worked out
def p_value(logs: tuple[float, ...], sign: int) -> float:
    """Compute the one-sided p-value of `logs` being centred at zero, against their lying on the side of `sign`.

    Student's t; from `TRIMMED_FROM` and `RANKS_FROM` pairs on also Yuen's trimmed t (Biometrika 61, 1974) and the exact
    signed-rank test: the smallest p-value, times the number of tests.
    """
    values = sign * np.asarray(logs)
    if len(values) < FEWEST:
        return 1.0
    if values.std() == 0:
        return 0.0 if values[0] > 0 else 1.0
    p_values = [
        factor * float(special.stdtr(test.freedom, -test.center / test.error)) for test, factor in _t_tests(values)
    ]
    if len(values) >= RANKS_FROM:
        p_values.append(_signed_rank_p_value(values))
    return min(1.0, _n_tests(len(values)) * min(p_values))


def estimate(logs: Sequence[float], alpha: float) -> Estimate:
    """Estimate the change that `logs` (two pairs or more) show, with its two-sided interval at level 1 - `alpha`.

    The interval holds what no test of `p_value` rejects.
    """
    center, low, high = _interval(logs, alpha)
    freedom = len(logs) - 1
    reach = (_t_quantile(alpha / 2, freedom) + _t_quantile(1 - POWER, freedom)) * _standard_error(np.asarray(logs))
    return Estimate(math.expm1(center), math.expm1(low), math.expm1(high), math.expm1(reach))


@functools.lru_cache(maxsize=1024)
def _is_same(found: LogRatios, threshold: float) -> bool:
    """Return whether an interval over all pairs lies within the threshold (two one-sided tests)."""
    logs = [*found.screening, *found.fresh]
    if len(logs) < FEWEST:
        return False
    _, low, high = _interval(logs, same_alpha(found))
    return -math.log1p(threshold) < low and high < math.log1p(threshold)


@functools.lru_cache(maxsize=1024)
def _center(logs: tuple[float, ...]) -> float:
    """Mean of a few, Hodges-Lehmann estimate of more."""
    if len(logs) < TRIMMED_FROM:
        return float(np.mean(logs))
    return math.log(paired_ratio(np.exp(logs), np.ones(len(logs))).estimate)


def _interval(logs: Sequence[float], alpha: float) -> tuple[float, float, float]:
    """Find center and ends: where the intervals of the tests of `p_value` overlap, each at its share of the level."""
    n, values = len(logs), np.asarray(logs)
    share = alpha / _n_tests(n)
    reaches = [
        (test.center, _t_quantile(share / factor / 2, test.freedom) * test.error) for test, factor in _t_tests(values)
    ]
    lows, highs = [center - reach for center, reach in reaches], [center + reach for center, reach in reaches]
    if n >= RANKS_FROM:
        ratio = paired_ratio(np.exp(values), np.ones(n), 1 - share)
        if ratio.low is not None and ratio.high is not None:
            lows.append(math.log(ratio.low))
            highs.append(math.log(ratio.high))
    center = _center(tuple(logs))
    return center, min(max(lows), center), max(min(highs), center)


class _T(NamedTuple):
    """What a t test is made of."""

    center: float
    error: float
    """Standard error of `center`."""
    freedom: int


def _t_quantile(tail: float, freedom: int) -> float:
    """Return the value that Student's t exceeds with the chance `tail`."""
    return -float(special.stdtrit(freedom, tail))  # what stats.t.isf calls, without its checks of a millisecond


def _standard_error(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    """Return the standard error of the mean."""
    return float(values.std(ddof=1)) / math.sqrt(len(values))


def _n_tests(n: int) -> int:
    """Count the tests of `n` pairs, which share the level."""
    return 1 + (n >= TRIMMED_FROM) + (n >= RANKS_FROM)


def _t_tests(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> list[tuple[_T, float]]:
    """List the t tests of `values`, each with the factor of its p-value; one without any scatter shows nothing."""
    tests = [(_T(float(values.mean()), _standard_error(values), len(values) - 1), 1.0)]
    if len(values) >= TRIMMED_FROM and (trimmed := _trimmed(values)).error > 0:
        tests.append((trimmed, TRIMMED_FACTOR))
    return tests


def _signed_rank_p_value(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    """Compute the exact p-value of `values` being centred above zero; of equal sizes the positive ones rank lowest."""
    positive = values[np.lexsort((values < 0, np.abs(values)))] > 0
    statistic = int((np.flatnonzero(positive) + 1).sum())
    return float(signed_rank_distribution(len(values))[statistic:].sum())


def _trimmed(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> _T:
    """Test the mean of `values` without the outer fifths."""
    n = len(values)
    cut = int(TRIMMED * n)
    inner = np.sort(values)[cut : n - cut]
    winsorized = np.clip(values, inner[0], inner[-1])
    return _T(float(inner.mean()), _standard_error(winsorized) * n / len(inner), len(inner) - 1)


def _holm(p_values: Mapping[str, float], alpha: float) -> list[str]:
    """List what Holm's step-down rejects, so that one wrong rejection is as likely as `alpha` at most."""
    rejected: list[str] = []
    for rank, key in enumerate(sorted(p_values, key=lambda key: p_values[key])):
        if p_values[key] > alpha / (len(p_values) - rank):
            break
        rejected.append(key)
    return rejected
