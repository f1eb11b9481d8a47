import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import nnls

from bench.analysis.roofline import PRIOR_WEIGHT, Point, leave_one_out, predict

shares = st.floats(1.0, 4.0)


@given(a=shares, b=shares, overhead_ms=st.floats(0.5, 20))
def test_a_time_that_is_shares_of_the_roofs_and_an_overhead_is_predicted_at_points_not_seen(a, b, overhead_ms):
    floors = [(rows * 0.7, 12.0 + 0.01 * rows) for rows in (1, 8, 32, 128, 512)]
    points = [Point(c, m, a * c + b * m + overhead_ms) for c, m in floors]
    for point, predicted in zip(points, leave_one_out(points), strict=True):
        assert predicted == pytest.approx(point.latency_ms, rel=0.1)


def test_a_case_is_never_predicted_from_itself():
    points = [Point(1.0, 10.0, 15.0), Point(2.0, 10.0, 17.0), Point(4.0, 10.0, 20.0)]
    spoilt = [points[0], points[1], Point(4.0, 10.0, 2000.0)]
    assert leave_one_out(points)[2] == leave_one_out(spoilt)[2]
    assert leave_one_out(points)[0] != leave_one_out(spoilt)[0]


def test_without_another_case_there_is_no_prediction():
    assert leave_one_out([Point(1.0, 10.0, 15.0)]) == [None]
    assert leave_one_out([]) == []


def test_one_other_case_at_the_same_point_predicts_its_own_time():
    assert predict(Point(1.0, 10.0, 1.0), [Point(1.0, 10.0, 40.0)]) == pytest.approx(40.0, rel=0.05)


@given(st.lists(st.tuples(*[st.floats(0.01, 1000)] * 3), min_size=2, max_size=6))
def test_a_prediction_is_a_positive_time(points):
    assert all(predicted is not None and predicted > 0 for predicted in leave_one_out([Point(*p) for p in points]))


@pytest.mark.parametrize("overhead_ms", [0.0, 3.0])
def test_of_many_points_each_is_predicted_as_from_all_others(overhead_ms):
    random = np.random.default_rng(1)
    floors = random.uniform(1, 20, (80, 2))
    noise = np.exp(random.normal(0, 0.05, 80))
    points = [Point(a, b, (1.3 * a + 1.1 * b + overhead_ms) * c) for (a, b), c in zip(floors, noise, strict=True)]
    predicted = leave_one_out(points)
    for number in range(0, 80, 16):
        expected = predict(points[number], [*points[:number], *points[number + 1 :]])
        assert predicted[number] == pytest.approx(expected, rel=1e-5)


@given(st.lists(st.tuples(*[st.floats(0.01, 1000)] * 3), min_size=1, max_size=6))
def test_the_fit_is_the_least_squares_without_a_negative_unknown(points):
    table = np.array(points)
    typical_ms = float(np.median(table[:, 2]))
    terms = np.column_stack([table[:, :2], np.full(len(table), typical_ms)]) / table[:, 2:]
    fit, _ = nnls(
        np.vstack([terms, PRIOR_WEIGHT * np.eye(3)]),
        np.concatenate([np.ones(len(table)), PRIOR_WEIGHT * np.array([1.0, 1.0, 0.0])]),
    )
    expected = float(fit @ (7.0, 5.0, typical_ms))
    assert predict(Point(7.0, 5.0, 1.0), [Point(*point) for point in points]) == pytest.approx(expected, rel=1e-6)
