import dataclasses

import msgspec
import numpy as np
import pandas as pd
import pytest

from bench.analysis import cautions, roofline
from bench.analysis import summary as summaries
from bench.analysis.tidy import Tidy
from bench.manifest import Origin
from bench.record import Covariates
from bench.tell import notes
from tests.handmade import QUIET, floors_ms, grid, make_case, make_run, smollm2_plan, steady_roofs

CASE = make_case()
SHARES = ["mfu", "mbu", "mfu_low", "mfu_high", "mbu_low", "mbu_high"]


def run_of(cases, ms=None, roofs=steady_roofs, **arguments):
    """A run whose forwards take 1.25 times their larger floor, unless `ms` says otherwise."""
    default = lambda case, step: 1.25 * max(floors_ms(case, step))  # noqa: E731
    quiet = {"turn_noise": 0, "step_noise": 0} | arguments
    return make_run(cases, ms=ms or default, plan=smollm2_plan, roofs=roofs, **quiet)


def summarize(run):
    return summaries.summarize(Tidy.of(run))


def rows(run, case=CASE):
    frame = summarize(run).query(f"strategy == '{case.strategy}' and n_prompt == {case.n_prompt}")
    return [frame[frame["phase"] == phase].iloc[0] for phase in ("prefill", "decode")]


def test_a_share_of_the_roof_is_the_floor_over_the_time():
    prefill, decode = rows(run_of([CASE]))
    compute_ms, memory_ms = floors_ms(CASE, 0)
    assert compute_ms > memory_ms
    assert [prefill[name] for name in ("mfu", "mfu_low", "mfu_high")] == pytest.approx([0.8] * 3, rel=1e-6)
    assert prefill["mbu"] == pytest.approx(0.8 * memory_ms / compute_ms, rel=1e-6)
    assert decode["mbu"] == pytest.approx(0.8, rel=1e-6)
    assert decode["mfu"] < 0.1
    assert [prefill["bound"], decode["bound"]] == ["compute", "memory"]


def test_bytes_and_intensity_come_from_the_plan():
    plan = smollm2_plan(CASE)
    prefill, decode = rows(run_of([CASE]))
    assert (prefill["bytes"], decode["bytes"]) == (plan.prefill.bytes, plan.decode.bytes)
    assert decode["arithmetic_intensity"] == pytest.approx(plan.decode.flops / plan.decode.bytes)


def test_a_drift_that_roof_and_case_share_cancels():
    """The neighbours halve the bandwidth from round to round; the share of it that the case reaches stays."""
    factors = [1, 2, 4, 1, 2, 4]
    run = run_of([CASE], roofs=lambda case, number: {k: v / factors[number] for k, v in steady_roofs(case, 0).items()})
    samples = [
        sample
        if sample.warmup
        else msgspec.structs.replace(sample, step_ns=[time * factors[sample.round] for time in sample.step_ns])
        for sample in run.samples
    ]
    _, decode = rows(msgspec.structs.replace(run, samples=samples))
    assert [decode[name] for name in ("mbu", "mbu_low", "mbu_high")] == pytest.approx([0.8] * 3, rel=1e-6)
    assert decode["latency_ms_high"] == pytest.approx(4 * decode["latency_ms_low"], rel=1e-6)


def test_a_turn_is_set_against_the_roof_nearest_before_and_after_it_in_its_round():
    own = pd.DataFrame({"process": 0, "round": [0, 0, 1, 2], "order": [3, 6, 9, 14]})
    roof = pd.DataFrame({"process": 0, "round": [0, 0, 0, 1], "order": [1, 4, 8, 11], "per_s": [10.0, 40.0, 90.0, 7.0]})
    found = roofline.beside(*({name: rows[name].to_numpy() for name in rows} for rows in (own, roof)))
    assert found["round"].tolist() == [0, 0, 1]  # the last has none in its round
    assert found["per_s"].tolist() == pytest.approx([20.0, 60.0, 7.0])


def test_neither_roof_binds_what_takes_more_than_twice_its_floor():
    _, decode = rows(run_of([CASE], ms=lambda case, step: 2.1 * max(floors_ms(case, step))))
    assert decode["bound"] == "overhead"


def with_weights(run, weights_bytes):
    plan = [msgspec.structs.replace(item, weights_bytes=weights_bytes) for item in run.manifest.plan]
    return msgspec.structs.replace(run, manifest=msgspec.structs.replace(run.manifest, plan=plan))


def of_before(run):
    """The run as it would have been stored when one read was held against all cases."""
    return msgspec.structs.replace(
        run, ceilings=[msgspec.structs.replace(one, read_bytes=None) for one in run.ceilings]
    )


def notes_of(run):
    """The footnote of the summary's table."""
    return notes.reading_line(summarize(run))


@pytest.mark.parametrize("weights_bytes", [1, 2 * 33_554_432, 10**9])
def test_mbu_is_there_for_weights_of_any_size(weights_bytes):
    run = with_weights(run_of([CASE]), weights_bytes)
    for row in rows(run):
        assert row["mbu"] > 0
        assert row["read_bytes"] == 1_000_000_000
    assert (
        notes_of(run)
        == "MBU is a share of the best read of as many bytes as the largest step of its cell reads (1000 MB).\n"
    )


@pytest.mark.parametrize(
    ("read_bytes", "cache_bytes", "limit"),
    [
        (540_000_000, 1 << 25, "540 MB, at most half the free memory, which a step exceeds"),
        (2 << 30, 1 << 25, "2147 MB, at most 2 GiB, which a step exceeds"),
        (1 << 32, 1 << 30, "4295 MB, at most four last-level caches, which a step exceeds"),
        (
            4 << 20,
            1 << 20,
            "4.19 MB, which is the smallest read that is timed, at most half the free memory, which a step exceeds",
        ),
        (5_000_000_000, 1 << 25, "5000 MB"),
    ],
)
def test_what_limited_a_read_that_is_smaller_than_a_step_is_named(read_bytes, cache_bytes, limit):
    """The largest step of the cell counts, here that of `static`."""
    run = run_of(grid(["dynamic", "static"], [128]))
    costs = dataclasses.replace(run.manifest.plan[0].decode, bytes=5_000_000_000, forward_calls=1)
    plan = [
        msgspec.structs.replace(item, decode=costs) if item.case.strategy == "static" else item
        for item in run.manifest.plan
    ]
    reads = [
        msgspec.structs.replace(one, read_bytes=one.read_bytes and read_bytes, cache_bytes=cache_bytes)
        for one in run.ceilings
    ]
    limited = msgspec.structs.replace(run, manifest=msgspec.structs.replace(run.manifest, plan=plan), ceilings=reads)
    assert f"the largest step of its cell reads ({limit}).\n" in notes_of(limited)


@pytest.mark.parametrize(("weights_bytes", "has_mbu"), [(2 * 33_554_432, False), (2 * 33_554_432 + 1, True)])
def test_in_older_runs_weights_that_the_cache_can_hold_have_no_mbu(weights_bytes, has_mbu):
    run = with_weights(of_before(run_of([CASE])), weights_bytes)
    for row in rows(run):
        assert (not np.isnan(row["mbu"])) == has_mbu
        assert row["mfu"] > 0
    why = (
        "No MBU: its weights are under twice the last-level cache (34 MB), and the ceiling of this older run is that "
        "of reading more than it holds.\n"
    )
    assert notes_of(run) == ("" if has_mbu else why)


def test_a_share_that_is_missing_has_its_reason_below_the_table():
    cases = [*grid(["dynamic", "cache:mine:make"], [32, 128]), make_case("naive", 128)]
    run = run_of(cases)
    plan = [
        msgspec.structs.replace(item, prefill=None, decode=None, unpredicted="it asks for numbers")
        if item.case.strategy == "naive"
        else item
        for item in run.manifest.plan
    ]
    manifest = msgspec.structs.replace(run.manifest, plan=plan, ceilings={"made": 1.0})
    first = [one for one in run.ceilings if one.cell == cases[0].cell.key]
    lost = msgspec.structs.replace(run, manifest=manifest, ceilings=first)
    said = notes_of(lost).split(". ")
    assert said[-4:-1] == [
        "MBU is a share of the best read of as many bytes as the largest step of its cell reads (1000 MB)",
        "No MFU and MBU of cache:mine:make, prompt 32; cache:mine:make, prompt 128: "  # noqa: ISC004
        "what a user's own cache reads is not known",
        "No MFU and MBU of dynamic, prompt 128: no ceilings were measured beside it: "  # noqa: ISC004
        "their worker failed, the run's messages said why",
    ]
    assert said[-1] == "No MFU and MBU of naive, prompt 128: no FLOPs and bytes are predicted: it asks for numbers.\n"


def test_disturbed_and_foreign_ceilings_are_named_as_the_reason():
    run = run_of([CASE])
    stolen = [msgspec.structs.replace(one, covariates=Covariates(steal_ns=10**9)) for one in run.ceilings]
    assert notes_of(msgspec.structs.replace(run, ceilings=stolen)) == (
        "No MFU and MBU: every turn of the ceilings beside it was disturbed.\n"
    )
    bare = run_of([CASE], roofs=None)
    manifest = msgspec.structs.replace(bare.manifest, origin=Origin(tool="llama-bench", path="x.json", digest=""))
    imported = notes_of(msgspec.structs.replace(bare, manifest=manifest))
    assert imported == "No MFU and MBU: llama-bench measures no ceilings.\n"


def test_ceilings_whose_rounds_are_no_round_of_the_case_give_no_share():
    run = run_of([CASE])
    other = [msgspec.structs.replace(one, round=one.round + 100) for one in run.ceilings]
    assert notes_of(msgspec.structs.replace(run, ceilings=other)) == (
        "No MFU and MBU: no turn of the ceilings was in one of its rounds.\n"
    )


def test_a_run_without_ceilings_has_no_shares_bounds_or_predictions():
    frame = summarize(run_of(grid(["naive", "dynamic"], [32, 128]), roofs=None))
    assert frame[[*SHARES, "bound", "predicted_ms"]].isna().all(axis=None)
    assert frame[["bytes", "arithmetic_intensity", "latency_ms"]].notna().all(axis=None)


def test_a_cell_whose_ceilings_were_lost_costs_only_its_own_columns():
    cases = grid(["dynamic"], [32, 128])
    run = run_of(cases)
    kept = [taken for taken in run.ceilings if taken.cell == cases[0].cell.key]
    lost = msgspec.structs.replace(run, ceilings=kept)
    assert rows(lost, cases[0])[1]["mbu"] == pytest.approx(0.8, rel=1e-6)
    assert np.isnan(rows(lost, cases[1])[1]["mbu"])


def test_warm_ups_and_disturbed_turns_of_a_ceiling_do_not_count():
    run = run_of([CASE], rounds=8)
    slow = [
        msgspec.structs.replace(
            taken,
            pass_ns=[10 * time for time in taken.pass_ns] if taken.warmup or taken.round == 3 else taken.pass_ns,
            covariates=Covariates(steal_ns=10**9) if taken.round == 3 else QUIET,
        )
        for taken in run.ceilings
    ]
    _, decode = rows(msgspec.structs.replace(run, ceilings=slow))
    assert decode["mbu_high"] == pytest.approx(0.8, rel=1e-6)


def test_one_slow_pass_does_not_lower_the_roof():
    (taken, *_) = run_of([CASE]).ceilings
    assert max(taken.pass_ns) == 2 * sorted(taken.pass_ns)[1]
    frame = Tidy.of(run_of([CASE])).ceilings.query("ceiling == 'read_bandwidth'")
    assert frame["per_s"].to_list() == pytest.approx([40e9] * 6)


def test_from_six_processes_on_the_interval_of_a_share_is_over_the_processes():
    run = run_of([CASE], processes=6)
    slower = [
        msgspec.structs.replace(sample, step_ns=[round(time * (1 + 0.1 * sample.process)) for time in sample.step_ns])
        for sample in run.samples
    ]
    _, decode = rows(msgspec.structs.replace(run, samples=slower))
    assert decode["mbu_low"] == pytest.approx(0.8 / 1.5, rel=1e-3)
    assert decode["mbu_high"] == pytest.approx(0.8, rel=1e-3)


def test_predictions_come_from_the_other_cases_of_the_strategy_and_phase():
    cases = grid(["naive", "dynamic"], [32, 128, 512, 2048])

    def ms(case, step):
        compute_ms, memory_ms = floors_ms(case, step)
        return 1.4 * compute_ms + 1.2 * memory_ms + 9

    frame = summarize(run_of(cases, ms=ms))
    assert (frame["predicted_ms"] / frame["latency_ms"] - 1).abs().max() < 0.1
    other = summarize(run_of(cases, ms=lambda case, step: (30 if case == cases[0] else 1) * ms(case, step)))
    for phase in ("prefill", "decode"):
        own, changed = (
            one[(one["phase"] == phase) & (one["strategy"] == "naive") & (one["n_prompt"] == 32)].iloc[0]
            for one in (frame, other)
        )
        assert changed["latency_ms"] == pytest.approx(30 * own["latency_ms"], rel=1e-3)
        assert changed["predicted_ms"] == pytest.approx(own["predicted_ms"], rel=1e-6)


def test_the_error_of_the_predictions_is_told_below_the_table():
    frame = summarize(run_of(grid(["dynamic"], [32, 128])))
    frame = frame.assign(predicted_ms=frame["latency_ms"] * [1.1, 1.0, 0.7, 1.0])
    assert notes.prediction_lines(frame).splitlines()[2:] == [
        "- prefill: median error 20.0%, largest 30.0%, over 2 cases",
        "- decode: median error 0.0%, largest 0.0%, over 2 cases",
    ]
    assert notes.prediction_lines(summarize(run_of([CASE]))) == ""


def test_a_strategy_above_the_roof_gives_a_caution():
    def found(factor):
        run = run_of([CASE], ms=lambda case, step: factor * max(floors_ms(case, step)))
        return [
            caution.text for caution in cautions.cautions(Tidy.of(run), summarize(run)) if "ceiling" in caution.text
        ]

    assert found(1 / 1.04) == []
    assert found(1 / 1.2) == [
        "prefill computes at 1.20 x the GEMM rate measured beside it: that is no ceiling",
        "decode reads at 1.20 x the bandwidth measured beside it: that is no ceiling",
    ]


def test_floors_are_there_for_the_plots():
    run = run_of([CASE])
    found = roofline.columns(Tidy.of(run))[CASE.key, "decode"]
    assert (found["compute_floor_ms"], found["memory_floor_ms"]) == pytest.approx(floors_ms(CASE, 1))
