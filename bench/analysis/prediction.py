"""Predicts a forward's time from its floors and what the other cases of its kind show: never from itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import lsq_linear

PRIOR_WEIGHT = 0.03
"""Of the expectation that both roofs are reached and nothing is added, against one measured case: a forward repeats
within some 3 %, while a share of the roof may be anything. It only decides what the other cases leave open."""


class Point(NamedTuple):
    """One case and phase, in milliseconds per forward: its two floors, and the measured median."""

    compute_ms: float
    memory_ms: float
    latency_ms: float


def leave_one_out(points: Sequence[Point]) -> list[float | None]:
    """What the others predict for each of `points` (of one strategy, phase and group), in ms; None for one alone."""
    return [
        predict(point, [*points[:number], *points[number + 1 :]]) if len(points) > 1 else None
        for number, point in enumerate(points)
    ]


def predict(point: Point, others: Sequence[Point]) -> float:
    """`a x compute floor + b x memory floor + c`, with a, b, c from `others` by least squares of relative errors.

    1 / a and 1 / b are the shares of the roofs that the strategy reaches, c is its overhead per forward, in ms; none is
    negative. The sum, and not the larger floor: products and attention follow each other and do not overlap.
    """
    table = np.array(others)
    measured = table[:, 2]
    typical_ms = float(np.median(measured))
    terms = np.column_stack([table[:, 0], table[:, 1], np.full(len(table), typical_ms)]) / measured[:, None]
    expected = np.array([1.0, 1.0, 0.0])
    fit = lsq_linear(
        np.vstack([terms, PRIOR_WEIGHT * np.eye(3)]),
        np.concatenate([np.ones(len(table)), PRIOR_WEIGHT * expected]),
        bounds=(0, np.inf),
    )
    a, b, c = fit.x
    return float(a * point.compute_ms + b * point.memory_ms + c * typical_ms)
