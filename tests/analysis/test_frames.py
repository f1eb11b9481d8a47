import msgspec
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.analysis import frames
from bench.record import Covariates
from tests.handmade import grid, make_case, make_run


def test_a_turn_gives_a_row_per_phase_with_the_case_the_round_and_the_covariates():
    case = make_case("dynamic", 128, n_gen=4)
    run = make_run(
        [case],
        rounds=1,
        warmups=0,
        turn_noise=0,
        step_noise=0,
        ms=lambda _, step: 100.0 if step == 0 else 10.0 * step,
        covariates=lambda _, number: Covariates(steal_ns=7, idle_arms_ns=number),
    )
    prefill, decode = frames.turns(run).to_dict("records")
    assert prefill["case"] == case.key
    assert {name: prefill[name] for name in frames.CASE_COLUMNS} == msgspec.structs.asdict(case)
    assert (prefill["phase"], decode["phase"]) == ("prefill", "decode")
    assert (prefill["latency_ms"], prefill["total_ms"]) == (100.0, 100.0)
    assert (decode["latency_ms"], decode["total_ms"]) == (20.0, 60.0)  # three steps for four tokens
    assert pd.isna(prefill["steps_timed"])
    assert decode["steps_timed"] == 3
    assert decode["wall_ms"] == prefill["wall_ms"] == 160.0
    assert (decode["steal_ns"], decode["idle_arms_ns"]) == (7, 0)
    assert pd.isna(decode["stall_ns"])


def test_the_steps_that_naive_does_not_time_are_interpolated():
    case = make_case("naive", 64)
    exact = make_run([case], rounds=1, warmups=0, turn_noise=0, step_noise=0, ms=lambda _, step: 900.0 + 1.5 * step)
    assert 1 < len(exact.samples[0].steps) < case.n_gen - 1
    decode = frames.turns(exact).query("phase == 'decode'").iloc[0]
    assert decode["latency_ms"] == pytest.approx(np.mean([900.0 + 1.5 * step for step in range(1, 32)]), rel=1e-3)
    assert decode["steps_timed"] == len(exact.samples[0].steps)


@given(st.integers(2, 40), st.integers(0, 2**32), st.data())
def test_rows_are_interpolated_to_the_bits_of_numpy(n_gen, seed, data):
    timed = sorted(data.draw(st.sets(st.integers(1, n_gen - 1), min_size=1)))
    times = np.random.default_rng(seed).integers(1, 10**9, (3, len(timed))).astype(float)
    at = np.arange(1, n_gen)
    made = frames._interpolated(at, np.array(timed, dtype=float), times)
    for row, found in zip(times, made, strict=True):
        assert (found == np.interp(at, timed, row)).all()
        assert found.sum() == np.interp(at, timed, row).sum()


def test_one_token_has_no_decode():
    run = make_run([make_case(n_gen=1)], rounds=2)
    assert set(frames.turns(run)["phase"]) == {"prefill"}
    assert frames.steps(run).empty


def test_a_decode_without_a_timed_step_is_refused():
    run = make_run([make_case()], rounds=1, warmups=0)
    torn = msgspec.structs.replace(run, samples=[msgspec.structs.replace(run.samples[0], steps=[], step_ns=[])])
    with pytest.raises(ValueError, match=r"no decode step of .* was timed in round 0"):
        frames.turns(torn)


def test_event_times_stand_for_host_times_where_there_are_any():
    run = make_run([make_case(device="cuda")], rounds=1, warmups=0, event_share=0.5)
    host = make_run([make_case(device="cuda")], rounds=1, warmups=0)
    for table in (frames.turns, frames.steps):
        assert table(run)["latency_ms"].to_numpy() == pytest.approx(table(host)["latency_ms"].to_numpy() / 2, rel=1e-6)
    assert frames.turns(run)["wall_ms"].equals(frames.turns(host)["wall_ms"])


def test_a_step_knows_its_position_and_whether_it_is_the_first():
    steps = frames.steps(make_run([make_case(n_prompt=100, n_depth=20, n_gen=5)], rounds=1, warmups=0))
    assert steps["step"].to_list() == [1, 2, 3, 4]
    assert steps["position"].to_list() == [121, 122, 123, 124]
    assert steps["first"].to_list() == [True, False, False, False]


def test_warmups_stay_and_are_flagged():
    run = make_run(grid(["naive", "dynamic"], [32]), rounds=3, warmups=2, processes=2)
    turns = frames.turns(run)
    assert turns["warmup"].sum() == 2 * 2 * 2 * 2
    assert len(turns) == 2 * 2 * 2 * 5
    assert set(turns["process"]) == {0, 1}


def test_a_turn_of_a_ceiling_has_the_rate_of_its_median_pass():
    run = make_run(grid(["naive", "dynamic"], [8]), rounds=2, roofs=lambda case, number: {"gemm": (1 + number) * 1e11})
    found = frames.ceilings(run)
    assert list(found.columns) == frames.CEILING_COLUMNS
    assert found["per_s"].to_list() == pytest.approx([1e11, 1e11, 2e11])
    assert found["warmup"].to_list() == [True, False, False]
    assert found["n_threads"].to_list() == [2, 2, 2]
    empty = frames.ceilings(make_run([make_case()]))
    assert list(empty.columns) == frames.CEILING_COLUMNS
    assert (empty.dtypes[["per_s", "warmup", "round"]] == found.dtypes[["per_s", "warmup", "round"]]).all()


@pytest.mark.parametrize(
    ("table", "columns"), [(frames.turns, frames.TURN_COLUMNS), (frames.steps, frames.STEP_COLUMNS)]
)
def test_a_run_without_samples_has_the_same_columns_of_the_same_types(table, columns):
    empty = table(make_run([make_case()], rounds=0, warmups=0))
    full = table(make_run([make_case()], rounds=1))
    assert list(empty.columns) == list(full.columns) == columns
    assert empty["latency_ms"].dtype == full["latency_ms"].dtype == "float64"
    assert empty["warmup"].dtype == full["warmup"].dtype == "bool"
