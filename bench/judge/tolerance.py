"""Finds how far a time may be from its stored sessions before it is a change: plain log shares -> a tolerance."""

import math
from collections.abc import Sequence

import msgspec
import numpy as np
from scipy import special

MIN_SESSIONS = 5
"""With fewer the spread between sessions is not known well enough to fail a build by it."""

FALSE_ALARMS = 0.01
"""Chance that a whole run of an unchanged tree has any time called a regression."""

POWER = 0.95
"""With this chance a slow-down of `Tolerance.detectable` is found."""


class Tolerance(msgspec.Struct, frozen=True, kw_only=True):
    """What is expected of one more session, in natural logs of the share of the roof."""

    center: float
    width: float
    """A run further below `center` than this has regressed."""
    detectable: float
    """The slow-down, as a log, that is found with the chance `POWER`."""
    n: int
    """Sessions behind it."""
    left_out_alarms: int
    """How many of them, each judged by the others alone, would have been called a change: 0 if they agree."""


def tolerance(log_shares: Sequence[float], n_judged: int) -> Tolerance:
    """Find the tolerance for one more session, when `n_judged` times of it are judged at once.

    The t prediction interval of one future observation (Hahn & Meeker 1991, section 4.7) with the level of
    `FALSE_ALARMS` divided by `n_judged` (Bonferroni); sessions, not rounds, are its sample, so it holds what the
    machine does between sessions. It is checked by leaving each session out: where one is further from the others than
    they allow, the normal spread is no fit, and the width grows to the largest such distance.

    Raises:
        ValueError: fewer than `MIN_SESSIONS` sessions, or a share that is not finite.
    """
    values = np.asarray(log_shares, dtype=np.float64)
    if len(values) < MIN_SESSIONS or not np.isfinite(values).all():
        raise ValueError(f"need {MIN_SESSIONS} finite log shares, got {values.tolist()}")
    n, level = len(values), 1 - FALSE_ALARMS / n_judged
    spread = _spread(values)
    width = float(special.stdtrit(n - 1, level)) * spread
    distances = []
    alarms = 0
    for left_out in range(n):
        others = np.delete(values, left_out)
        distance = abs(float(values[left_out] - others.mean()))
        distances.append(distance)
        alarms += distance > float(special.stdtrit(n - 2, level)) * _spread(others)
    if alarms:
        width = max(width, *distances)
    return Tolerance(
        center=float(values.mean()),
        width=width,
        detectable=width + float(special.stdtrit(n - 1, POWER)) * spread,
        n=n,
        left_out_alarms=int(alarms),
    )


def slow_down(log_share: float, expected: float) -> float:
    """Return how much slower it is, as a share of the expected time: 0.05 is five percent; below zero it is faster."""
    return math.expm1(expected - log_share)


def _spread(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    """Return the standard deviation of one more value around the mean of these."""
    return float(np.std(values, ddof=1) * math.sqrt(1 + 1 / len(values)))
