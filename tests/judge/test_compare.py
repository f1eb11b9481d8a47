import msgspec
import numpy as np
import pytest

from bench.analysis.estimators import Ratio, unpaired_ratio
from bench.analysis.tidy import Tidy
from bench.judge import compare
from bench.judge.ranking import Ranking
from bench.record import CellPlan
from bench.tell import comparison
from tests.handmade import ENVIRONMENT, compared, fail, grid, make_case, make_run, ranked, smollm2_ms, steady_roofs

CASES = grid(["naive", "dynamic"], [32, 512])


def scaled(factor, phase_of=None):
    """Times of the usual model, those of decode (or of everything) multiplied."""
    return lambda case, step: smollm2_ms(case, step) * (factor if step or phase_of != "decode" else 1)


def test_a_run_against_itself_shows_nothing():
    run = make_run(CASES, turn_noise=0.03)
    found = compared(run, run)
    assert found.exit_code == 0
    assert len(found.rows) == 8
    assert found.rows["ratio"].to_list() == pytest.approx([1] * 8)
    assert set(found.rows["verdict"]) == {"no difference shown"}
    assert set(found.rows["interval"]) == {"unpaired"}
    assert found.differences == []
    assert found.same_machine
    assert (
        comparison.sentence(found) == "B (handmade) against A (handmade), 8 times of 4 cases: no difference shown in 8"
    )


def test_what_got_faster_and_slower_is_said_in_a_line():
    a = make_run(CASES, path="runs/before")
    b = make_run(CASES, path="runs/after/", seed=1, ms=scaled(0.5, "decode"))
    found = compared(a, b)
    verdicts = found.rows.groupby("phase")["verdict"].unique()
    assert list(verdicts["decode"]) == ["faster"]
    assert list(verdicts["prefill"]) == ["no difference shown"]
    assert comparison.sentence(found).startswith(
        "B (after) against A (before), 8 times of 4 cases: faster in 4 (most: "
    )
    back = compared(b, a)
    assert set(back.rows.loc[back.rows["phase"] == "decode", "verdict"]) == {"slower"}
    assert back.rows["ratio"].to_list() == pytest.approx((1 / found.rows["ratio"]).to_list())


def test_rows_hold_the_case_and_both_medians_in_ms():
    a = make_run([make_case(n_prompt=100)], turn_noise=0, step_noise=0, ms=lambda _, step: 10.0 if step else 100.0)
    b = make_run([make_case(n_prompt=100)], turn_noise=0, step_noise=0, ms=lambda _, step: 15.0 if step else 100.0)
    rows = compared(a, b).rows
    assert list(rows.columns) == compare.ROW_COLUMNS
    decode = rows[rows["phase"] == "decode"].iloc[0]
    assert (decode["strategy"], decode["n_prompt"]) == ("dynamic", 100)
    assert (decode["a_ms"], decode["b_ms"]) == (10, 15)
    assert decode["ratio"] == pytest.approx(1.5)
    assert decode["ratio_low"] == pytest.approx(1.5)
    assert decode["verdict"] == "slower"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.8, 0.99, "faster"),
        (0.8, 1.0, "no difference shown"),
        (1.0, 1.2, "no difference shown"),
        (1.01, 1.2, "slower"),
        (None, None, "too few rounds"),
    ],
)
def test_a_verdict_needs_an_interval_beside_one(low, high, expected):
    assert compare.difference(Ratio(estimate=1.0, low=low, high=high)) == expected


def test_a_ratio_is_that_of_the_two_medians_beside_it():
    """Also where the turns of each run are in two clusters, and most differences say the opposite."""
    fast, slow = [3.0, 3.1, 3.0, 3.1], [5.0, 5.1, 5.2]
    ratio = unpaired_ratio([*fast, *slow], [*fast[:3], *slow, 5.3])
    assert ratio.estimate == pytest.approx(3.1 / 5.0)
    assert ratio.low <= ratio.estimate <= ratio.high
    rows = compared(make_run(CASES, turn_noise=0.2), make_run(CASES, turn_noise=0.2, seed=1)).rows
    assert rows["ratio"].to_list() == pytest.approx((rows["b_ms"] / rows["a_ms"]).to_list())


def test_too_few_rounds_are_not_no_difference():
    a, b = make_run(CASES, rounds=3), make_run(CASES, rounds=3, ms=scaled(20))
    found = compared(a, b)
    assert comparison.sentence(found) == "B (handmade) against A (handmade), 8 times of 4 cases: too few rounds in 8"
    assert found.rows["ratio"].to_list() == pytest.approx([20] * 8, rel=0.2)


def test_a_case_on_one_side_is_exit_3_with_the_nearest_one_named():
    a = make_run([*CASES, make_case(n_prompt=2048, n_threads=4)])
    b = make_run([*CASES, make_case(n_prompt=2048)])
    found = compared(a, b)
    assert found.exit_code == 3
    assert [(one.case.n_threads, one.reason) for one in found.only_in_a] == [
        (4, "not in B, which has it with n_threads = 2")
    ]
    assert found.only_in_b[0].reason == "not in A, which has it with n_threads = 4"
    assert comparison.sentence(found).endswith("2 other cases not comparable")


def test_nothing_in_common_is_exit_3():
    found = compared(make_run(CASES), make_run(grid(["static"], [64])))
    assert found.exit_code == 3
    assert found.rows.empty
    assert comparison.sentence(found) == (
        "B (handmade) against A (handmade): nothing could be compared "
        "(strategy: A has naive, dynamic, B has static; n_prompt: A has 32, 512, B has 64); 5 cases not comparable"
    )
    assert "nothing could be compared" in comparison.render(found, "md")
    assert comparison.render(found, "jsonl") == ""


def test_a_failed_case_is_not_comparable():
    a, b = make_run(CASES), make_run(CASES, failures=[fail(CASES[1], "oom", "no memory")])
    found = compared(a, b)
    assert found.not_comparable == [compare.Excluded(case=CASES[1], reason="oom in B: no memory")]
    assert found.exit_code == 3
    assert CASES[1].key not in set(found.rows["strategy"] + " " + found.rows["n_prompt"].astype(str))
    assert len(found.rows) == 6


def test_other_tokens_are_not_comparable_however_fast():
    a, b = make_run(CASES), make_run(CASES, tokens_match={CASES[1].key: "false"}, ms=scaled(0.1))
    found = compared(a, b)
    assert found.not_comparable[0].reason == "failed in B: emitted other tokens"
    assert found.exit_code == 3


def test_what_failed_on_both_sides_takes_nothing_from_the_others():
    runs = [make_run(CASES, failures=[fail(CASES[1], "unsupported", "no compiler")]) for _ in "ab"]
    found = compared(*runs)
    assert found.exit_code == 0
    assert found.not_comparable == []
    assert found.in_neither[0].reason == "unsupported in A: no compiler; unsupported in B: no compiler"


def test_a_case_the_other_run_did_not_come_to():
    b = make_run(CASES)
    early = msgspec.structs.replace(b, samples=[sample for sample in b.samples if sample.case != CASES[3].key])
    found = compared(make_run(CASES), early)
    assert found.only_in_a == [compare.Excluded(case=CASES[3], reason="B ended before it")]
    assert found.exit_code == 3


def test_a_case_that_budget_left_out_is_named_with_that_reason():
    b, left_out = make_run(CASES), "left out to end within --budget 5 (minutes)"
    cell = CASES[3].cell.key
    b = msgspec.structs.replace(
        b,
        samples=[sample for sample in b.samples if sample.case not in {CASES[2].key, CASES[3].key}],
        cell_plans=[CellPlan(cell=cell, repetitions=6, tokens_per_turn=32, left_out=left_out, spent_s=1.0)],
    )
    found = compared(make_run(CASES), b)
    assert {excluded.reason for excluded in found.only_in_a} == {f"not measured in B: {left_out}"}


def test_other_weights_under_the_same_name_are_not_comparable():
    a, b = make_run(CASES), make_run(CASES)
    manifest = msgspec.structs.replace(b.manifest, weights={"smollm2-135m": "77" * 32})
    found = compared(a, msgspec.structs.replace(b, manifest=manifest))
    assert found.exit_code == 3
    assert {case.reason for case in found.not_comparable} == {"the weights of smollm2-135m differ"}
    assert found.differences == [f"weights of smollm2-135m: {'5f' * 32} -> {'77' * 32}"]


def test_other_kernels_of_a_product_are_named():
    def computed_by(**kernels):
        run = make_run(CASES)
        checks = [msgspec.structs.replace(check, kernels=kernels) for check in run.checks]
        return msgspec.structs.replace(run, checks=checks)

    found = compared(computed_by(head="sum-2", own="linear", o="linear"), computed_by(head="sum-4", o="linear"))
    assert found.differences == ["kernel of head: sum-2 -> sum-4"]
    assert found.same_machine


def test_another_environment_is_told_and_a_loaded_moment_is_none():
    elsewhere = msgspec.structs.replace(
        ENVIRONMENT, cpu_model="Xeon", torch="2.14.0", load_1min=1.5, governor="powersave"
    )
    found = compared(make_run(CASES), make_run(CASES, environment=elsewhere))
    assert found.differences == [
        "cpu_model: AMD EPYC 9B45 -> Xeon",
        "torch: 2.13.0 -> 2.14.0",
        "governor: None -> powersave",
    ]
    assert not found.same_machine
    assert "on another machine or software" in comparison.sentence(found)
    same = compared(make_run(CASES), make_run(CASES, environment=msgspec.structs.replace(ENVIRONMENT, git_commit="9")))
    assert same.same_machine
    assert same.differences == ["git_commit: 0123abc -> 9"]


def test_the_interval_holds_a_true_ratio_between_sessions():
    held = 0
    for seed in range(60):
        a = make_run([CASES[1]], turn_noise=0.05, seed=seed)
        b = make_run([CASES[1]], turn_noise=0.05, seed=1000 + seed, ms=scaled(1.1))
        rows = compared(a, b).rows
        held += int(((rows["ratio_low"] <= 1.1) & (rows["ratio_high"] >= 1.1)).sum())
    assert held >= 0.9 * 120
    assert not np.isnan(held)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"model": "random:gpt2"}, ["model: A has smollm2-135m, B has random:gpt2"]),
        ({"dtype": "bfloat16", "n_gen": 8}, ["dtype: A has float32, B has bfloat16", "n_gen: A has 32, B has 8"]),
    ],
)
def test_runs_without_a_case_in_common_are_told_which_fields_differ(fields, says):
    found = compared(make_run(CASES, path="runs/a"), make_run(grid(["naive"], [32], **fields), path="runs/b"))
    assert found.fields_apart == says
    assert comparison.sentence(found).startswith(
        f"B (b) against A (a): nothing could be compared ({'; '.join(says)}); "
    )
    assert found.exit_code == 3


def test_runs_with_a_case_in_common_differ_in_no_field():
    assert compared(make_run(CASES), make_run(CASES[:1])).fields_apart == []


def test_a_run_without_its_turns_is_compared_as_one_with_them():
    """`kvbench compare` keeps only what the times of turns are made of: two large runs do not fit in memory."""
    cases = grid(["naive", "dynamic"], [32, 128])
    runs = make_run(cases, roofs=steady_roofs), make_run(cases, seed=1, roofs=steady_roofs)
    lean = [Tidy.lean(run) for run in runs]
    assert [len(tidy.run.samples) + len(tidy.run.ceilings) for tidy in lean] == [0, 0]
    found, whole = compare.compare(*lean), compared(*runs)
    assert found.rows.equals(whole.rows)
    assert comparison.render(found, "md") == comparison.render(whole, "md")
    assert Ranking.of(lean).entries.equals(ranked(runs).entries)
