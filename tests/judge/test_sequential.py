"""The decisions of an A/B on figures alone: levels, looks, Holm, and the error rates of the whole procedure."""

import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import stats

from bench.ab import conduct, verdicts
from bench.judge import sequential
from bench.judge.sequential import LogRatios
from tests.handmade import grid
from tests.synthetic import Machine

THRESHOLD = 0.03
CORES = 2
QUIET = (0.001, -0.002, 0.0, 0.002)

logs = st.lists(st.floats(-0.5, 0.5).filter(lambda value: abs(value) > 1e-6), min_size=4, max_size=20, unique=True)


def slower(share: float, n: int, scatter: float = 0.003) -> tuple[float, ...]:
    return tuple(math.log1p(share) + scatter * math.sin(i) for i in range(n))


def run(machine: Machine, seed: int, cases: int = 2) -> dict[str, str]:
    """Kind by quantity, of a whole A/B on a synthetic machine; the slow-down is in every decode."""
    tried = grid(["dynamic"], [128, 256, 512][:cases])
    records = conduct.conduct(
        tried,
        machine.pairs(seed),
        threshold=THRESHOLD,
        cores=CORES,
        budget_s=math.inf,
        clock=iter(range(10**6)).__next__,
        say=lambda text: None,
    )
    found = verdicts.verdicts(records, tried, THRESHOLD, CORES)
    return {f"{verdict.case.key} {verdict.phase}": verdict.kind for verdict in found}


@hypothesis.given(logs)
def test_the_p_values_of_the_two_directions_mirror_each_other(values):
    mirrored = tuple(-value for value in values)
    assert sequential.p_value(tuple(values), 1) == pytest.approx(sequential.p_value(mirrored, -1))


@hypothesis.given(logs, st.sampled_from([0.05, 0.01]))
def test_an_interval_holds_its_estimate_and_grows_with_its_level(values, alpha):
    narrow, wide = sequential.estimate(values, alpha), sequential.estimate(values, alpha / 4)
    assert narrow.low <= narrow.effect <= narrow.high
    assert wide.low <= wide.effect <= wide.high
    assert narrow.detectable >= 0
    if len(values) < sequential.RANKS_FROM:
        assert wide.low <= narrow.low
        assert narrow.high <= wide.high


def test_the_t_test_is_students():
    values = (0.03, 0.05, 0.02, 0.04, 0.06)
    by_scipy = stats.ttest_1samp(values, 0, alternative="greater").pvalue
    assert sequential.p_value(values, 1) == pytest.approx(by_scipy)


@pytest.mark.parametrize("n", [1, 2, 10, 33])
@pytest.mark.parametrize("center", [-0.5, 0, 0.5])
def test_the_test_of_ranks_is_the_exact_one(n, center):
    values = np.random.default_rng(n).normal(center, 1, n)
    by_scipy = stats.wilcoxon(values, alternative="greater", method="exact").pvalue
    assert sequential._signed_rank_p_value(values) == pytest.approx(by_scipy)


def test_equal_sizes_are_no_evidence():
    assert sequential._signed_rank_p_value(np.array([1, -1])) == 0.75
    assert sequential._signed_rank_p_value(np.array([1, -1, 0])) == 0.75


def test_ranks_rescue_a_change_that_one_outlier_hides_from_the_t_test():
    values = (*slower(0.1, 13), 3.0)
    by_t = stats.ttest_1samp(values, 0, alternative="greater").pvalue
    assert by_t > 0.05
    assert sequential.p_value(values, 1) < 0.001


def test_trimming_rescues_it_where_pairs_are_too_few_for_ranks():
    values = (*slower(0.1, 7), 0.5)
    assert len(values) < sequential.RANKS_FROM
    assert stats.ttest_1samp(values, 0, alternative="greater").pvalue > 0.001
    assert sequential.p_value(values, 1) < 1e-5
    assert sequential.confirm({"a": LogRatios(QUIET, values)}, {}, THRESHOLD) == {"a": "regression"}
    shown = sequential.estimate(values, sequential.change_alpha(1))
    assert 0 < shown.low < 0.1 < shown.high < 0.2  # as the test that found it, not about the mean of all


def test_the_error_of_a_trimmed_mean_is_yuens():
    values = np.array([0.01, 0.03, 0.02, 0.05, 0.04, 0.02, 0.03, 0.9])
    winsorized = np.clip(values, 0.02, 0.05)
    center, error, freedom = sequential._trimmed(values)
    assert (center, freedom) == (pytest.approx(np.sort(values)[1:7].mean()), 5)
    assert error == pytest.approx(winsorized.std(ddof=1) / (0.75 * math.sqrt(8)))
    assert error == pytest.approx(float(stats.mstats.trimmed_stde(values, limits=(1 / 8, 1 / 8))))


@hypothesis.given(logs, st.sampled_from([1, -1]), st.sampled_from([0.05, 0.001]))
def test_an_interval_holds_zero_unless_a_test_rejects_it(values, sign, alpha):
    shown = sequential.estimate(values, alpha)
    beyond = shown.low > 0 if sign > 0 else shown.high < 0
    assert not beyond or sequential.p_value(tuple(values), sign) <= alpha / 2 * (1 + 1e-9)


@pytest.mark.parametrize("n", [4, 8, 12, 20])
def test_a_look_keeps_its_level(n):
    """3,000 decisions at a level of one in a hundred, on noise alone."""
    random = np.random.default_rng(n)
    rejected = sum(sequential.p_value(tuple(random.normal(0, 0.01, n)), 1) < 0.01 for _ in range(3000))
    assert rejected < 50  # 30 are expected at most; more than 50 has a chance of 0.0003


@hypothesis.given(logs, st.sampled_from([1, -1]))
def test_a_look_decides_the_same_however_loud_the_machine_is(values, sign):
    """Screening may have been quiet, and then a disturbance began: how far pairs scatter is in no p-value."""
    louder = tuple(8 * value for value in values)
    assert sequential.p_value(louder, sign) == pytest.approx(sequential.p_value(tuple(values), sign))


def test_screening_calls_same_what_lies_within_the_threshold_and_flags_the_rest():
    figures = {
        "still": LogRatios(QUIET),
        "slower": LogRatios(slower(0.05, 4)),
        "noisy": LogRatios((0.1, -0.1, 0.05, -0.05)),
        "short": LogRatios(QUIET[:1]),
    }
    assert sequential.screen(figures, THRESHOLD) == {"still": "same"}


def test_what_flagged_a_quantity_is_no_evidence_against_it():
    found = {"a": LogRatios(slower(0.2, 4), QUIET * 2)}
    assert sequential.confirm(found, {}, THRESHOLD) == {}


@pytest.mark.parametrize(("share", "call"), [(0.1, "regression"), (-0.1, "faster"), (0.0, "same"), (0.028, None)])
def test_confirmation_decides_on_fresh_pairs(share, call):
    found = {"a": LogRatios(slower(share, 4), slower(share, 8))}
    assert sequential.confirm(found, {}, THRESHOLD).get("a") == call


def test_a_change_that_is_certain_but_within_the_threshold_is_none():
    found = {"a": LogRatios(slower(0.02, 4), slower(0.02, 40))}
    assert sequential.p_value(found["a"].fresh, 1) < 1e-9
    assert sequential.confirm(found, {}, THRESHOLD) == {"a": "same"}


def test_more_flagged_quantities_ask_for_more_evidence():
    found = {"a": LogRatios(slower(0.07, 4, scatter=0.018), slower(0.07, 6, scatter=0.018))}
    level = sequential.ALPHA / len(sequential.CONFIRMATION_LOOKS)
    assert level / 21 < sequential.p_value(found["a"].fresh, 1) < level
    others = {f"{i}": LogRatios((0.1, -0.1, 0.1, -0.1), (0.1, -0.1, 0.1, -0.1, 0.1, -0.1)) for i in range(20)}
    assert sequential.confirm(found, {}, THRESHOLD) == {"a": "regression"}
    assert "a" not in sequential.confirm(found | others, {}, THRESHOLD)


def test_pairs_without_a_figure_decide_nothing():
    found = {"a": LogRatios((), ()), "b": LogRatios(QUIET, (0.5,))}
    assert sequential.screen({"a": LogRatios(())}, THRESHOLD) == {}
    assert sequential.confirm(found, {}, THRESHOLD) == {}


@pytest.mark.parametrize(("lockstep", "decided"), [(False, 0.7), (True, 0.5)])
def test_an_unchanged_tree_raises_no_alarm(lockstep, decided):
    kinds = [kind for seed in range(60) for kind in run(Machine(lockstep=lockstep), seed).values()]
    assert "regression" not in kinds
    assert kinds.count("same") > decided * len(kinds)


@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize("slowdown", [0.05, 0.1])
def test_a_real_slow_down_is_found_and_prefill_is_left_alone(slowdown, lockstep):
    found = [run(Machine(slowdown=slowdown, lockstep=lockstep), seed) for seed in range(20)]
    decode = [kind for kinds in found for name, kind in kinds.items() if name.endswith("decode")]
    assert decode.count("regression") >= 0.95 * len(decode)
    assert all(kind != "regression" for kinds in found for name, kind in kinds.items() if name.endswith("prefill"))


def test_a_gain_is_called_faster():
    kinds = run(Machine(slowdown=-0.1), 0)
    assert {kind for name, kind in kinds.items() if name.endswith("decode")} == {"faster"}


@pytest.mark.parametrize(
    "machine",
    [
        Machine(hog_from=2),
        Machine(hog_from=sequential.SCREENING_PAIRS),
        Machine(blocks=1, hog_from=sequential.SCREENING_PAIRS),
        Machine(odd_pair=0.3),
        Machine(process_sd=0.03, drift=0.5),
    ],
)
def test_a_disturbed_machine_raises_no_alarm_either(machine):
    assert all("regression" not in run(machine, seed, cases=1).values() for seed in range(25))
