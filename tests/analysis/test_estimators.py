import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bench.analysis import estimators
from bench.analysis.estimators import median_interval, paired_ratio, unpaired_ratio

times = st.floats(min_value=1e-3, max_value=1e6)


def sample(size):
    return np.exp(np.random.default_rng(size).normal(3, 0.1, size))


def test_six_values_give_their_smallest_and_largest():
    assert median_interval([6, 1, 5, 2, 4, 3]) == (3.5, 1, 6)
    assert median_interval([1, 2, 3, 4, 5]) == (3, None, None)


@pytest.mark.parametrize("size", [6, 7, 12, 33])
def test_the_median_lies_in_an_interval_that_is_a_binomial_test_turned_round(size):
    values = np.sort(sample(size))
    _, low, high = median_interval(values)
    for bound, outside in ((low, -1e-9), (high, 1e-9)):
        below = int((values < bound + outside).sum())
        assert stats.binomtest(below, size).pvalue < 0.05


@pytest.mark.parametrize("size", [*range(1, 60), 200, 201])
def test_the_interval_of_the_median_is_scipys(size):
    values = sample(size)
    found = stats.quantile_test(values).confidence_interval(0.95)
    expected = (found.low, found.high) if np.isfinite(found).all() else (None, None)
    assert median_interval(values) == (np.median(values), *expected)


@pytest.mark.parametrize("size", [6, 9, 20])
def test_the_paired_interval_is_the_signed_rank_test_turned_round(size):
    a, b = sample(size), sample(size + 100)[:size]
    ratio = paired_ratio(a, b)
    logs = np.log(a / b)
    for bound, out in ((ratio.low, -1e-9), (ratio.high, 1e-9)):
        shift = math.log(bound)
        assert stats.wilcoxon(logs - shift - out, method="exact").pvalue < 0.05
        assert stats.wilcoxon(logs - shift + out, method="exact").pvalue > 0.05


@pytest.mark.parametrize(("m", "n"), [(4, 4), (6, 6), (6, 11), (15, 9)])
def test_the_unpaired_interval_is_the_mann_whitney_test_turned_round(m, n):
    a, b = sample(m), sample(n + 100)[:n]
    ratio = unpaired_ratio(a, b)
    for bound, out in ((ratio.low, -1e-9), (ratio.high, 1e-9)):
        shift = math.log(bound)
        outside = stats.mannwhitneyu(np.log(a) - shift - out, np.log(b), method="exact").pvalue
        inside = stats.mannwhitneyu(np.log(a) - shift + out, np.log(b), method="exact").pvalue
        assert outside < 0.05 < inside


def test_too_small_a_sample_has_an_estimate_and_no_interval():
    assert paired_ratio([2] * 5, [1] * 5).low is None
    assert paired_ratio([2] * 5, [1] * 5).estimate == pytest.approx(2)
    assert unpaired_ratio([2] * 3, [1] * 3).high is None
    assert paired_ratio([2] * 6, [1] * 6).low == pytest.approx(2)


pairs = st.lists(st.tuples(times, times), min_size=1, max_size=12)


def close(left, right):
    return (left is None and right is None) or left == pytest.approx(right, rel=1e-9)


@given(pairs, st.sampled_from([paired_ratio, unpaired_ratio]))
def test_swapping_the_two_inverts_the_ratio(values, estimator):
    a, b = zip(*values, strict=True)
    forth, back = estimator(a, b), estimator(b, a)
    assert close(forth.estimate, 1 / back.estimate)
    assert close(forth.low, None if back.high is None else 1 / back.high)
    assert close(forth.high, None if back.low is None else 1 / back.low)


@given(pairs, st.floats(0.01, 100), st.sampled_from([paired_ratio, unpaired_ratio]))
def test_the_unit_does_not_matter_and_a_factor_comes_through(values, factor, estimator):
    a, b = zip(*values, strict=True)
    plain = estimator(a, b)
    assert close(estimator([factor * x for x in a], [factor * x for x in b]).estimate, plain.estimate)
    scaled = estimator([factor * x for x in a], b)
    assert close(scaled.estimate, factor * plain.estimate)
    assert close(scaled.low, None if plain.low is None else factor * plain.low)


@given(pairs, st.sampled_from([paired_ratio, unpaired_ratio]))
def test_the_estimate_lies_in_its_interval(values, estimator):
    ratio = estimator(*zip(*values, strict=True))
    if ratio.low is not None:
        assert ratio.low <= ratio.estimate * (1 + 1e-12)
        assert ratio.estimate <= ratio.high * (1 + 1e-12)


@pytest.mark.parametrize("size", [6, 10])
def test_at_least_95_percent_of_the_intervals_hold_the_truth(size):
    """Skewed noise with stalls, as times have; 400 repetitions leave a standard error of one percent."""
    random = np.random.default_rng(11)
    held = {"median": 0, "paired": 0, "unpaired": 0}
    for _ in range(400):
        drift = np.exp(random.normal(0, 0.2, size))
        a, b, other = (np.exp(random.exponential(0.05, size)) for _ in range(3))
        truth = math.exp(0.05 * math.log(2))
        _, low, high = median_interval(a)
        held["median"] += low <= truth <= high
        ratio = paired_ratio(3 * a * drift, b * drift)
        held["paired"] += ratio.low <= 3 <= ratio.high
        ratio = unpaired_ratio(3 * a, other)
        held["unpaired"] += ratio.low <= 3 <= ratio.high
    assert min(held.values()) >= 0.93 * 400, held


@pytest.mark.parametrize("estimator", [paired_ratio, unpaired_ratio])
@pytest.mark.parametrize("wrong", [[1, math.nan], [1, math.inf], [1, 0.0], [1, -2], []])
def test_what_is_no_time_is_refused(estimator, wrong):
    with pytest.raises(ValueError, match=r"finite|positive"):
        estimator(wrong, wrong)


def test_nan_has_no_median_and_unequal_lengths_no_pairs():
    with pytest.raises(ValueError, match="finite"):
        median_interval([1, math.nan])
    with pytest.raises(ValueError, match="pairs, got 2 and 1"):
        paired_ratio([1, 2], [1])


@given(st.integers(1, 2500))
def test_the_ranks_of_the_median_are_those_of_scipy_for_every_size(size):
    values = np.arange(size, dtype=float)
    interval = stats.quantile_test(values).confidence_interval(confidence_level=0.95)
    _, low, high = median_interval(values)
    expected = [None if math.isnan(end) else end for end in (interval.low, interval.high)]
    assert [low, high] == expected


@pytest.mark.parametrize(("m", "n"), [(1, 1), (3, 5), (7, 2), (20, 20), (40, 31)])
def test_the_mann_whitney_statistic_has_the_chances_that_counting_gives(m, n):
    counts = [1] + [0] * (m * n)
    for i in range(1, m + 1):
        for value in range(m * n, n + i - 1, -1):
            counts[value] -= counts[value - n - i]
        for value in range(i, m * n + 1):
            counts[value] += counts[value - i]
    exact = np.array(counts[: m * n // 2 + 1], dtype=float) / math.comb(m + n, m)
    assert estimators._mann_whitney_distribution(m, n) == pytest.approx(exact, rel=1e-9)


def test_the_largest_exact_mann_whitney_distribution_is_whole():
    """It is symmetric: its lower half with half of the middle value is one half."""
    chances = estimators._mann_whitney_distribution(200, 200)
    assert chances.sum() - chances[-1] / 2 == pytest.approx(0.5, abs=1e-12)


@settings(max_examples=20)
@given(st.integers(201, 320), st.integers(201, 320), st.integers(0, 2**32), st.booleans())
def test_beyond_200_values_an_interval_differs_by_less_than_a_thousandth(m, n, seed, in_steps):
    random = np.random.default_rng(seed)
    a, b = (np.exp(random.normal(3, 0.1, size) + random.exponential(0.05, size)) for size in (m, n))
    if in_steps:  # many equal times, as of a coarse clock
        a, b = np.round(a), np.round(b)
    for estimate, values in ((paired_ratio, (a[:201], b[:201])), (unpaired_ratio, (a, b))):
        found = estimate(*values)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(estimators, "EXACT", 10**6)
            exact, less, more = (estimate(*values, level) for level in (0.95, 0.948, 0.952))
        assert found.estimate == pytest.approx(exact.estimate, rel=1e-5)
        # Among equal times one rank more or less can be a whole step, so an end is compared by its level.
        assert more.low * (1 - 1e-9) <= found.low <= less.low * (1 + 1e-9)
        assert less.high * (1 - 1e-9) <= found.high <= more.high * (1 + 1e-9)
        if not in_steps:
            assert (found.low, found.high) == pytest.approx((exact.low, exact.high), rel=1e-3)
