import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.judge.tolerance import FALSE_ALARMS, MIN_SESSIONS, slow_down, tolerance

SHARES = st.lists(st.floats(-3, 0), min_size=MIN_SESSIONS, max_size=12)


@pytest.mark.parametrize("n_sessions", [5, 8])
def test_false_alarms_are_as_rare_as_promised(n_sessions: int) -> None:
    random = np.random.default_rng(n_sessions)
    alarms = 0
    for _ in range(2000):
        *stored, head = random.normal(math.log(0.8), 0.03, n_sessions + 1)
        expected = tolerance(stored, n_judged=1)
        alarms += head < expected.center - expected.width
    assert alarms <= 2 * FALSE_ALARMS * 2000  # five standard deviations above what is promised


def test_what_is_detectable_is_detected() -> None:
    random = np.random.default_rng(1)
    found = 0
    for _ in range(500):
        *stored, head = random.normal(0, 0.02, 7)
        expected = tolerance(stored, n_judged=4)
        found += head - expected.detectable < expected.center - expected.width
    assert found >= 0.93 * 500


@given(SHARES, st.floats(-2, 2))
def test_only_the_differences_matter(shares: list[float], shift: float) -> None:
    one, other = tolerance(shares, 4), tolerance([share + shift for share in shares], 4)
    assert other.center == pytest.approx(one.center + shift, abs=1e-9)
    assert other.width == pytest.approx(one.width, abs=1e-6) or one.left_out_alarms != other.left_out_alarms


@given(SHARES)
def test_more_judgements_need_a_wider_tolerance(shares: list[float]) -> None:
    assert tolerance(shares, 16).width >= tolerance(shares, 1).width
    assert tolerance(shares, 1).detectable >= tolerance(shares, 1).width >= 0


def test_a_session_apart_from_the_others_widens_it() -> None:
    agreeing = [0.0, 0.001, -0.001, 0.0005, -0.0005, 0.0008, -0.0008, 0.0]
    assert tolerance(agreeing, 1).left_out_alarms == 0
    found = tolerance([*agreeing, -0.05], 1)
    assert found.left_out_alarms == 1
    assert found.width >= 0.05


@pytest.mark.parametrize("shares", [[], [0.0] * 4, [0.0] * 4 + [math.nan], [0.0] * 5 + [-math.inf]])
def test_too_few_or_impossible_shares_are_refused(shares: list[float]) -> None:
    with pytest.raises(ValueError, match="finite log shares"):
        tolerance(shares, 1)


def test_a_slow_down_is_a_share_of_the_time() -> None:
    assert slow_down(math.log(0.4), math.log(0.8)) == pytest.approx(1.0)
    assert slow_down(math.log(0.8), math.log(0.4)) == pytest.approx(-0.5)
