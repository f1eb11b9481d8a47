"""The k-th smallest of all pairwise sums of two samples, without making all of them: O(n log n) for n values each.

Johnson & Mizoguchi (1978, SIAM J. Comput. 7, 147-153) narrow the sums down by counting how many of them lie below a
bound: in sorted samples the sums of each row below it are a prefix. Here the bounds are interpolated, not drawn.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

ROOM = 4
"""Times as many sums as rows that are made at last, to be partitioned."""

NARROW = 1e-12
"""Sums of logarithms that differ by less are one value."""

LARGE, THIN = 4096, 512
"""Of larger samples so many values, evenly spread, give the first two bounds, about `MARGIN` of all sums apart."""
MARGIN = 1 / 150


def kth_sum(x: Floats, y: Floats, k: int, *, triangle: bool = False) -> float:
    """Return the `k`-th smallest (from 1) of the sums `x[i] + y[j]`; both are sorted.

    `triangle` leaves out those with j < i, so that a sample with itself has each pair once, and each value with itself.
    """
    first = np.arange(len(x)) if triangle else np.zeros(len(x), dtype=np.int64)

    def reach(bound: float) -> Ints:
        """Count, for each row, the values of `y` up to `bound`, those before `first` included."""
        return np.maximum(np.searchsorted(y, bound - x, side="right"), first)

    low, high = float(x[0] + y[0]), float(x[-1] + y[-1])
    below, above = first, np.full(len(x), len(y))
    before, until = 0, int((above - below).sum())
    bounds = _first_bounds(x, y, k / until, triangle=triangle)
    tries = 0
    while until - before > ROOM * len(x) and high - low > NARROW:
        tries += 1
        # A little beyond k on either side, so that the bounds close in from both; halves where the sums are clustered.
        aim = (k + (len(x) if tries % 2 else -len(x)) - before) / (until - before)
        bound = bounds.pop() if bounds else low + (high - low) * (min(max(aim, 0.02), 0.98) if tries % 3 else 0.5)
        reached = reach(bound)
        count = int((reached - first).sum())
        if count >= k and bound < high:
            high, above, until = bound, reached, count
        elif count < k and bound > low:
            low, below, before = bound, reached, count
    if until - before > ROOM * len(x):
        return high
    lengths = above - below
    rows = np.repeat(np.arange(len(x)), lengths)
    columns = np.arange(until - before) + np.repeat(below - np.cumsum(lengths) + lengths, lengths)
    return float(np.partition(x[rows] + y[columns], k - before - 1)[k - before - 1])


def _first_bounds(x: Floats, y: Floats, share: float, *, triangle: bool) -> list[float]:
    """Guess two sums on either side of the one below which `share` of all lie, from some of the values."""
    if len(x) <= LARGE or len(y) <= LARGE:
        return []
    thin_x, thin_y = (values[len(values) // THIN // 2 :: len(values) // THIN] for values in (x, y))
    n_sums = len(thin_x) * (len(thin_x) + 1) // 2 if triangle else len(thin_x) * len(thin_y)
    ranks = (min(max(round((share + side * MARGIN / 2) * n_sums), 1), n_sums) for side in (-1, 1))
    return [kth_sum(thin_x, thin_y, rank, triangle=triangle) for rank in ranks]
