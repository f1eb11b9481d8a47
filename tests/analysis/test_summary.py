import re
from pathlib import Path

import msgspec
import numpy as np
import pandas as pd
import pytest

from bench.analysis import columns, summary
from bench.analysis.estimators import paired_ratio
from bench.analysis.tidy import NOT_MEASURED, Tidy
from bench.record import Covariates
from tests.handmade import ENVIRONMENT, QUIET, fail, grid, make_case, make_run, run_with_lossy_kinds

COLUMNS = [
    "model",
    "strategy",
    "phase",
    "device",
    "dtype",
    "attn_implementation",
    "n_threads",
    "batch_size",
    "n_prompt",
    "n_gen",
    "n_depth",
    "samples",
    "latency_ms",
    "latency_ms_low",
    "latency_ms_high",
    "tokens_per_s",
    "speedup_vs_naive",
    "speedup_low",
    "speedup_high",
    "flops",
    "bytes",
    "arithmetic_intensity",
    "gemm_flops",
    "gemv_flops",
    "mfu",
    "mbu",
    "bound",
    "predicted_ms",
    "forward_calls",
    "tokens_processed",
    "kv_bytes_predicted",
    "kv_bytes_measured",
    "peak_memory_bytes",
    "compile_s",
    "steps_timed",
    "tokens_match",
    "status",
    "error",
    "mfu_low",
    "mfu_high",
    "mbu_low",
    "mbu_high",
    "speedup_vs_hf",
    "speedup_vs_hf_low",
    "speedup_vs_hf_high",
    "framework_ms",
    "exact",
    "kv_bytes_allocated",
    "kv_bytes_allocated_predicted",
    "kv_bytes_per_token",
    "matching_tokens",
    "top1_agreement",
    "recall_agreement",
    "logit_kl",
    "logit_kl_p99",
    "logit_kl_floor",
    "perplexity_ratio",
    "kv_bytes_vs_exact",
    "latency_vs_exact",
    "latency_vs_exact_low",
    "latency_vs_exact_high",
    "peak_beyond_weights_bytes",
    "workspace_bytes",
    "weights_bytes",
    "machine",
    "setup",
]


def summarize(run):
    return summary.summarize(Tidy.of(run))


NUMBERS = ["samples", "latency_ms", "latency_ms_low", "latency_ms_high", "tokens_per_s", "steps_timed"]
SPEEDUP = ["speedup_vs_naive", "speedup_low", "speedup_high"]


def row(run, case, phase="decode"):
    frame = summarize(run)
    names = ["strategy", "n_prompt", "n_gen", "dtype", "batch_size"]
    wanted = (frame[names] == [getattr(case, name) for name in names]).all(axis=1) & (frame["phase"] == phase)
    (found,) = frame[wanted].to_dict("records")
    return found


def test_the_columns_are_those_of_the_contract_in_its_order_also_of_a_run_without_samples():
    cases = grid(["naive", "dynamic"], [32, 128])
    full, empty = summarize(make_run(cases)), summarize(make_run(cases, rounds=0, warmups=0))
    assert list(full.columns) == list(empty.columns)
    assert columns.NAMES == COLUMNS
    assert set(COLUMNS) < set(full.columns)
    assert (full.dtypes == empty.dtypes).all()
    assert len(full) == len(empty) == 8
    assert set(full["machine"]) == set(empty["machine"]) == {ENVIRONMENT.hostname}


def test_latency_and_throughput_count_tokens_of_the_whole_batch_and_never_the_prompt():
    case = make_case(batch_size=4, n_prompt=50, n_gen=11)
    run = make_run([case], turn_noise=0, step_noise=0, ms=lambda _, step: 500.0 if step == 0 else 20.0)
    prefill, decode = row(run, case, "prefill"), row(run, case)
    assert prefill["latency_ms"] == prefill["latency_ms_low"] == prefill["latency_ms_high"] == 500
    assert prefill["tokens_per_s"] == pytest.approx(4 * 50 / 0.5)
    assert decode["latency_ms"] == 20
    assert decode["tokens_per_s"] == pytest.approx(4 / 0.02)
    assert (decode["samples"], decode["steps_timed"]) == (6, 10)


def test_the_speed_up_pairs_the_rounds_of_a_cell():
    cases = grid(["naive", "dynamic"], [4, 512])  # at 4 every naive step is timed
    run = make_run(cases, turn_noise=0.05)
    frame = summarize(run)
    naive_ms, own_ms = (
        [np.mean(sample.step_ns) for sample in run.samples if sample.case == case.key and not sample.warmup]
        for case in cases[:2]
    )
    expected = paired_ratio(naive_ms, own_ms)
    found = row(run, cases[1])
    assert [found[name] for name in SPEEDUP] == pytest.approx([expected.estimate, expected.low, expected.high])
    naive = frame[frame["strategy"] == "naive"]
    assert (naive[SPEEDUP] == 1).all(axis=None)


def test_drift_that_both_share_cancels_in_the_speed_up():
    cases = grid(["naive", "dynamic"], [32])
    steady = make_run(cases, turn_noise=0, step_noise=0)
    drifting = msgspec.structs.replace(
        steady,
        samples=[
            msgspec.structs.replace(sample, step_ns=[time * (1 + sample.round) for time in sample.step_ns])
            for sample in steady.samples
        ],
    )
    found = row(drifting, cases[1])
    assert found["speedup_low"] == pytest.approx(found["speedup_high"], rel=1e-6)
    assert found["latency_ms_high"] > 2 * found["latency_ms_low"]


@pytest.mark.parametrize("strategies", [["dynamic"], ["naive", "dynamic"]])
def test_without_a_time_of_naive_there_is_no_speed_up(strategies):
    cases = grid(strategies, [32])
    failures = [fail(case) for case in cases if case.strategy == "naive"]
    frame = summarize(make_run(cases, failures=failures))
    assert frame[SPEEDUP].isna().all(axis=None)


def test_fewer_than_six_rounds_have_a_median_and_no_interval():
    case = make_case()
    found = row(make_run([case], rounds=5), case)
    assert found["latency_ms"] > 0
    assert np.isnan(found["latency_ms_low"])


def test_disturbed_rounds_count_neither_alone_nor_in_pairs():
    cases = grid(["naive", "dynamic"], [32])
    stolen = make_run(
        cases,
        rounds=8,
        covariates=lambda case, number: (
            Covariates(steal_ns=10**12) if (case.strategy, number) in {("naive", 1), ("dynamic", 2)} else QUIET
        ),
    )
    assert row(stolen, cases[0])["samples"] == row(stolen, cases[1])["samples"] == 7
    assert row(stolen, cases[1])["speedup_low"] > 1  # six pairs are left


@pytest.mark.parametrize("status", ["failed", "oom", "timeout", "unsupported"])
def test_a_failed_case_keeps_its_rows_without_numbers(status):
    cases = grid(["naive", "dynamic"], [32])
    run = make_run(cases, failures=[fail(cases[1], status, "the reason")])
    for phase in ("prefill", "decode"):
        found = row(run, cases[1], phase)
        assert (found["status"], found["error"]) == (status, "the reason")
        assert np.isnan([found[name] for name in SPEEDUP]).all()
        assert found["forward_calls"] > 0  # what arithmetic says needs no measurement
    frame = summarize(run)
    assert frame.loc[frame["strategy"] == "dynamic", NUMBERS].isna().all(axis=None)
    assert row(run, cases[0])["status"] == "ok"


def test_a_failure_in_one_process_is_the_failure_of_the_case_and_the_worst_is_told():
    case = make_case()
    run = make_run(
        [case], processes=3, failures=[fail(case, "timeout", "slow", process=1), fail(case, "failed", "NaN", process=2)]
    )
    assert (row(run, case)["status"], row(run, case)["error"]) == ("failed", "NaN")
    assert np.isnan(row(run, case)["latency_ms"])


def test_other_tokens_are_a_failure_and_a_tie_is_none():
    cases = grid(["naive", "dynamic", "static"], [32])
    run = make_run(cases, tokens_match={cases[1].key: "false", cases[2].key: "tie"})
    assert [row(run, case)["tokens_match"] for case in cases] == ["true", "false", "tie"]
    assert [row(run, case)["status"] for case in cases] == ["ok", "failed", "ok"]
    assert np.isnan(row(run, cases[1])["latency_ms"])


def test_a_case_the_run_did_not_come_to_says_so():
    case = make_case()
    found = row(make_run([case], rounds=0), case)
    assert (found["status"], found["error"]) == ("not measured", NOT_MEASURED)


def test_counters_come_from_the_plan_and_sizes_from_the_worst_process():
    case = make_case("compiled", n_prompt=100, n_gen=5)
    run = make_run([case], processes=2)
    prefill, decode = row(run, case, "prefill"), row(run, case)
    assert (prefill["tokens_processed"], decode["tokens_processed"]) == (100, 4)
    assert (decode["flops"], decode["gemm_flops"], decode["gemv_flops"]) == (12, 8, 4)
    assert (prefill["kv_bytes_predicted"], decode["kv_bytes_predicted"]) == (800, 832)
    assert (prefill["kv_bytes_measured"], decode["kv_bytes_measured"]) == (800, 832)
    assert decode["peak_memory_bytes"] == 600_000_001
    assert decode["compile_s"] == 13.5


def test_the_framework_is_the_median_step_without_arithmetic_over_all_processes():
    cases = [make_case("dynamic"), make_case("naive")]
    run = make_run(cases, processes=2)
    assert row(run, cases[0])["framework_ms"] == pytest.approx(0.9)
    assert np.isnan(row(run, cases[0], "prefill")["framework_ms"])
    assert np.isnan(row(run, cases[1])["framework_ms"])


def test_a_part_is_never_shown_above_its_whole():
    """The framework is timed before the rounds: a machine that was slower then made it longer than the step."""
    run = make_run([make_case("dynamic")], ms=lambda *_: 0.8, turn_noise=0, step_noise=0)
    assert np.isnan(row(run, make_case("dynamic"))["framework_ms"])


def test_a_model_of_unknown_costs_has_empty_counters():
    run = make_run([make_case()])
    (plan,) = run.manifest.plan
    unknown = msgspec.structs.replace(plan, prefill=None, decode=None)
    manifest = msgspec.structs.replace(run.manifest, plan=[unknown])
    frame = summarize(msgspec.structs.replace(run, manifest=manifest))
    assert frame[["flops", "forward_calls", "kv_bytes_predicted"]].isna().all(axis=None)
    assert frame["latency_ms"].notna().all()


def test_one_token_has_a_prefill_row_alone():
    assert summarize(make_run([make_case(n_gen=1)]))["phase"].to_list() == ["prefill"]


def test_from_six_processes_on_the_interval_is_over_the_processes():
    """Each process has a speed of its own; rounds pooled over processes would claim to know the median too well."""
    cases = grid(["naive", "dynamic"], [32])
    run = make_run(cases, processes=6, rounds=20, turn_noise=0)
    shifted = [
        msgspec.structs.replace(sample, step_ns=[round(time * (1 + 0.1 * sample.process)) for time in sample.step_ns])
        for sample in run.samples
    ]
    found = row(msgspec.structs.replace(run, samples=shifted), cases[1])
    assert found["samples"] == 120
    assert found["latency_ms_low"] == pytest.approx(40.3, rel=0.01)
    assert found["latency_ms_high"] == pytest.approx(40.3 * 1.5, rel=0.01)
    assert found["speedup_high"] / found["speedup_low"] < 1.02  # both arms of a process have its speed


def test_every_column_is_explained_with_its_unit():
    readme = (Path(__file__).resolve().parents[2] / "results" / "README.md").read_text(encoding="utf-8")
    explained = [line.split("|")[1] for line in readme.split("## Columns")[1].splitlines() if line.startswith("| `")]
    assert [name for cell in explained for name in re.findall(r"`(\w+)`", cell)] == COLUMNS


def test_quality_and_bytes_of_lossy_kinds() -> None:
    frame = summary.summarize(Tidy.of(run_with_lossy_kinds())).set_index(["strategy", "phase", "n_prompt"])
    exact, lossy = frame.loc[("dynamic", "decode", 300)], frame.loc[("fp8", "decode", 300)]
    own = frame.loc[("cache:mine:make", "decode", 300)]
    assert (exact["exact"], lossy["exact"], own["exact"]) == ("true", "false", "false")
    assert exact[["top1_agreement", "logit_kl", "matching_tokens", "recall_agreement"]].isna().all()
    for row in (lossy, own):
        assert row["top1_agreement"] == 0.5
        assert row["recall_agreement"] == 0.75
        assert (row["logit_kl"], row["logit_kl_floor"], row["perplexity_ratio"]) == (0.02, 1e-3, 1.25)
        assert row["logit_kl_p99"] == 0.2
        assert row["matching_tokens"] == 3
        assert row["kv_bytes_vs_exact"] == 0.25
        assert row["kv_bytes_per_token"] == pytest.approx(200)
        assert row["latency_vs_exact_low"] <= row["latency_vs_exact"] <= row["latency_vs_exact_high"]
    assert exact["kv_bytes_per_token"] == pytest.approx(800)
    assert (exact["kv_bytes_vs_exact"], exact["latency_vs_exact"]) == (1, 1)
    assert lossy["kv_bytes_allocated_predicted"] == 8
    assert own["kv_bytes_allocated_predicted"] is pd.NA
    assert frame.loc[("fp8", "prefill", 300), "kv_bytes_allocated_predicted"] == 7


def test_runs_of_before_there_were_lossy_kinds_hold_exact_ones() -> None:
    frame = summary.summarize(Tidy.of(make_run(grid(["naive", "dynamic"], [100]))))
    assert set(frame["exact"]) == {"true"}
    assert frame["kv_bytes_allocated"].isna().all()


def test_bytes_of_a_users_own_cache_are_not_known():
    summary = summarize(run_with_lossy_kinds())
    by_arithmetic = ["bytes", "arithmetic_intensity", "kv_bytes_predicted", "mbu", "bound", "predicted_ms"]
    own = summary["strategy"] == "cache:mine:make"
    assert summary.loc[own, by_arithmetic].isna().all(axis=None)
    assert summary.loc[own, ["flops", "forward_calls", "tokens_processed"]].notna().all(axis=None)
    assert summary.loc[~own, ["bytes", "arithmetic_intensity", "kv_bytes_predicted"]].notna().all(axis=None)


@pytest.mark.parametrize(
    ("strategy", "peak", "workspace"),
    [("dynamic", 900, 400), ("dynamic", 500, 0), ("dynamic", 499, None), ("offloaded", 900, None)],
)
def test_workspace_is_empty_where_the_cache_is_no_part_of_the_peak(strategy, peak, workspace):
    case = make_case(strategy=strategy)
    run = make_run([case])
    checks = [
        msgspec.structs.replace(check, peak_beyond_weights_bytes=peak, kv_bytes_allocated_after_decode=500)
        for check in run.checks
    ]
    found = row(msgspec.structs.replace(run, checks=checks), case)["workspace_bytes"]
    assert (None if pd.isna(found) else found) == workspace
