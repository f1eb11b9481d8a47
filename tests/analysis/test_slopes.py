import msgspec
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats

from bench.analysis import slopes
from bench.analysis.tidy import Tidy
from tests.handmade import grid, make_case, make_run


def fitted(run):
    return slopes.slopes(Tidy.of(run).steps).set_index("strategy")


def test_the_slope_of_a_straight_line_comes_out_exactly():
    run = make_run(
        grid(["dynamic"], [32, 512]),
        turn_noise=0,
        step_noise=0,
        ms=lambda case, step: 40 + 0.007 * (case.n_prompt + step),
    )
    line = fitted(run).loc["dynamic"]
    assert line["slope_ms_per_1000_tokens"] == pytest.approx(7, rel=1e-4)
    assert line["intercept_ms"] == pytest.approx(40, rel=1e-4)
    assert (line["samples"], line["first_position"], line["last_position"]) == (6, 33, 543)


def test_contexts_are_pooled_and_strategies_and_settings_are_not():
    cases = [*grid(["naive", "dynamic"], [32, 512]), *grid(["dynamic"], [32], dtype="bfloat16")]
    lines = slopes.slopes(Tidy.of(make_run(cases)).steps)
    assert list(zip(lines["strategy"], lines["dtype"], strict=True)) == [
        ("naive", "float32"),
        ("dynamic", "float32"),
        ("dynamic", "bfloat16"),
    ]


def test_a_stall_in_a_step_moves_it_little():
    def stalled(case, step):
        return (40 + 0.007 * (case.n_prompt + step)) * (20 if step == 5 else 1)

    run = make_run(grid(["dynamic"], [32, 128, 512, 2048]), ms=stalled, turn_noise=0, step_noise=0.01)
    assert fitted(run).loc["dynamic", "slope_ms_per_1000_tokens"] == pytest.approx(7, rel=0.1)


def test_the_interval_holds_the_truth_although_the_steps_of_a_turn_are_slow_together():
    """40 runs: an interval that resamples steps, as theilslopes' own, would hold it in about ten of them."""
    held = 0
    for seed in range(40):
        line = fitted(make_run(grid(["dynamic"], [32, 2048], n_gen=8), turn_noise=0.03, seed=seed)).loc["dynamic"]
        held += line["slope_low"] <= 7 <= line["slope_high"]
    assert held >= 36


def test_a_line_is_scipys_theil_sen():
    x, noise = np.repeat([0.1, 0.2, 0.7, 1.1], 5), np.random.default_rng(0).normal(0, 1, 20)
    found, expected = slopes._line(x, 40 + 7 * x + noise), stats.theilslopes(40 + 7 * x + noise, x)
    assert found == pytest.approx((expected.slope, 0, expected.intercept), rel=1e-12)


def test_fewer_than_six_rounds_have_no_interval():
    line = fitted(make_run(grid(["dynamic"], [32, 512]), rounds=5)).loc["dynamic"]
    assert np.isnan(line["slope_low"])
    assert line["slope_ms_per_1000_tokens"] > 0


def test_a_pass_that_lacks_a_context_length_is_no_line():
    run = make_run(grid(["dynamic"], [32, 512]))
    last = [sample for sample in run.samples if not sample.warmup and sample.round == 5 and " p512 " in sample.case]
    torn = msgspec.structs.replace(run, samples=[sample for sample in run.samples if sample not in last])
    assert fitted(torn).loc["dynamic", "samples"] == 5


@pytest.mark.parametrize(("n_prompts", "n_gen"), [([128], 2), ([8, 64, 512], 2), ([8], 9), ([2048], 64)])
def test_too_few_positions_have_a_row_without_a_slope(n_prompts, n_gen):
    line = fitted(make_run(grid(["dynamic"], n_prompts, n_gen=n_gen))).loc["dynamic"]
    assert line[["slope_ms_per_1000_tokens", "slope_low", "slope_high", "intercept_ms"]].isna().all()
    assert (line["samples"], line["first_position"]) == (0, n_prompts[0] + 1)


def test_no_steps_have_no_row():
    assert slopes.slopes(Tidy.of(make_run([make_case(n_gen=1)])).steps).empty


def test_a_long_decode_is_thinned_and_still_fitted():
    run = make_run([make_case(n_gen=1200)], rounds=6)
    assert fitted(run).loc["dynamic", "slope_ms_per_1000_tokens"] == pytest.approx(7, rel=0.2)


def test_a_curve_of_a_strategy_that_refeeds_has_its_slope_at_the_last_position():
    """A straight line would miss it at both ends: naive attends among all the tokens that it feeds."""

    def bent(case, step):
        tokens = (case.n_prompt + step) / 1000
        return 10 + 500 * tokens + 400 * tokens**2

    run = make_run(grid(["naive"], [32, 128, 512, 2048]), turn_noise=0, step_noise=0, ms=bent)
    line = fitted(run).loc["naive"]
    assert line["slope_at"] == line["last_position"]
    last = line["last_position"] / 1000
    assert line["slope_ms_per_1000_tokens"] == pytest.approx(500 + 800 * last, rel=1e-3)
    assert [line["curvature_ms"], line["intercept_ms"]] == pytest.approx([400, 10], rel=1e-2)
    positions = np.array([40.0, 520.0, 2060.0])
    expected = [10 + 0.5 * x + 0.0004 * x**2 for x in positions]
    assert slopes.latency_at(line, positions) == pytest.approx(expected, rel=1e-2)


def test_a_stall_moves_a_parabola_little():
    def stalled(case, step):
        return (10 + 0.5 * (case.n_prompt + step)) * (8 if case.n_prompt == 128 and step == 2 else 1)

    run = make_run(grid(["naive"], [32, 128, 512, 2048]), ms=stalled, turn_noise=0, step_noise=0.01)
    assert fitted(run).loc["naive", "slope_ms_per_1000_tokens"] == pytest.approx(500, rel=0.1)


@given(seed=st.integers(0, 2**32 - 1), stalls=st.integers(0, 4), bend=st.floats(0, 1e3))
def test_a_parabola_is_scipys(seed, stalls, bend):
    random = np.random.default_rng(seed)
    x = np.repeat([0.032, 0.128, 0.512, 2.048], 8) + np.tile(np.arange(8) / 1000, 4)
    latency = (10 + 500 * x + bend * x**2) * random.lognormal(0, 0.02, len(x))
    latency[random.choice(len(x), stalls, replace=False)] *= 5
    terms = np.stack([np.ones_like(x), x, x**2], axis=1) / latency[:, None]
    start = np.linalg.lstsq(terms, np.ones_like(x), rcond=None)[0]
    found = optimize.least_squares(
        lambda c: terms @ c - 1, start, jac=lambda _: terms, loss="cauchy", f_scale=slopes.STALL, x_scale="jac"
    )
    slope, curvature, intercept = slopes._parabola(x, latency)
    fitted = [slope - 2 * curvature * x.max(), curvature, intercept]
    assert np.abs(terms @ (np.array([fitted[2], fitted[0], fitted[1]]) - found.x)).max() < 1e-3


def test_a_bend_is_not_sought_within_one_context_length():
    line = fitted(make_run(grid(["naive"], [128], n_gen=64))).loc["naive"]
    assert pd.isna(line["slope_at"])
    assert line["slope_ms_per_1000_tokens"] > 0


def test_a_line_is_scipys():
    random = np.random.default_rng(0)
    x = np.repeat(np.arange(20) / 10, 3)
    latency_ms = 5 + x + random.exponential(0.1, 60)
    line = stats.theilslopes(latency_ms, x)
    assert slopes._line(x, latency_ms) == (line.slope, 0.0, line.intercept)
