import msgspec
import pytest

from bench.analysis.disturbance import CLOCK_TICK_NS
from bench.analysis.tidy import Tidy, independent_values
from bench.record import CellPlan, Covariates
from tests.handmade import ENVIRONMENT, QUIET, fail, grid, make_case, make_run

TURN_MS = 1000.0


def one_second(case, step):
    """A turn of one second: 200 ms of prefill and 31 steps."""
    return 200.0 if step == 0 else 800.0 / 31


def disturbed(covariates, cores=2, case=None):
    run = make_run(
        [case or make_case()],
        rounds=1,
        ms=one_second,
        turn_noise=0,
        step_noise=0,
        covariates=lambda *_: covariates,
        environment=msgspec.structs.replace(ENVIRONMENT, cores=cores),
    )
    return bool(Tidy.of(run).measured["disturbed"].all())


@pytest.mark.parametrize(("steal_ns", "expected"), [(0, False), (99_000_000, False), (101_000_000, True)])
def test_more_than_five_percent_of_the_threads_time_stolen_disturbs_a_turn(steal_ns, expected):
    assert disturbed(Covariates(steal_ns=steal_ns)) is expected


def test_threads_count_but_not_more_than_there_are_cores():
    stolen = Covariates(steal_ns=101_000_000)
    assert not disturbed(stolen, cores=64, case=make_case(n_threads=8))
    assert disturbed(stolen, cores=2, case=make_case(n_threads=8))
    assert disturbed(stolen, cores=64, case=make_case(n_threads=2))


def test_one_tick_of_the_steal_counter_is_rounding():
    tiny = make_run(
        [make_case()], rounds=1, ms=lambda *_: 0.1, covariates=lambda *_: Covariates(steal_ns=CLOCK_TICK_NS)
    )
    assert not Tidy.of(tiny).measured["disturbed"].any()


@pytest.mark.parametrize(("reasons", "expected"), [(0x0, False), (0x1, False), (0x4, False), (0x24, True), (0x8, True)])
def test_a_throttled_gpu_disturbs_a_turn_unless_it_is_the_power_cap_that_heavy_kernels_reach(reasons, expected):
    assert disturbed(Covariates(gpu_throttle_reasons=reasons)) is expected


def test_nothing_else_disturbs_a_turn():
    unlucky = Covariates(steal_ns=0, stall_ns=10**9, involuntary_switches=10**4, page_faults=10**6, idle_arms_ns=10**9)
    assert not disturbed(unlucky)
    assert not disturbed(Covariates())  # a machine that tells nothing


def steal_in(*numbers):
    return lambda _, number: Covariates(steal_ns=10**12) if number in numbers else QUIET


def test_disturbed_rounds_and_warmups_are_left_out():
    run = make_run(grid(["naive", "dynamic"], [32]), covariates=steal_in(1, 4))
    assert set(Tidy.of(run).turns["round"]) == {0, 2, 3, 5}
    assert set(Tidy.of(run).steps["round"]) == {0, 2, 3, 5}
    assert not Tidy.of(run).steps["warmup"].any()


def test_where_every_round_is_disturbed_all_are_kept():
    run = make_run([make_case()], covariates=steal_in(*range(6)))
    assert set(Tidy.of(run).turns["round"]) == set(range(6))


def test_a_case_that_failed_in_one_process_has_no_usable_turn():
    cases = grid(["naive", "dynamic"], [32])
    run = make_run(cases, processes=2, failures=[fail(cases[1], process=1)])
    assert set(Tidy.of(run).turns["case"]) == {cases[0].key}


def test_a_run_without_samples_has_no_usable_turn():
    run = make_run([make_case()], rounds=0, warmups=0)
    assert Tidy.of(run).turns.empty
    assert Tidy.of(run).steps.empty


def test_from_six_processes_on_the_process_is_what_is_resampled():
    def values(processes):
        turns = Tidy.of(make_run([make_case()], processes=processes, rounds=3)).turns
        return turns[turns["phase"] == "decode"], independent_values(turns[turns["phase"] == "decode"])

    turns, few = values(5)
    assert few == turns["latency_ms"].to_list()
    turns, many = values(6)
    assert many == turns.groupby("process")["latency_ms"].median().to_list()


def without(run, process, *numbers):
    """The run without these rounds of one process."""
    kept = [taken for taken in run.samples if taken.warmup or taken.process != process or taken.round not in numbers]
    return msgspec.structs.replace(run, samples=kept)


def test_replaced_rounds_of_one_process_hide_no_missing_ones_of_another():
    run = make_run([make_case()], rounds=6, processes=2, repetitions=4)
    assert Tidy.of(run).unfinished == []
    assert Tidy.of(without(run, 1, 4, 5)).unfinished == []
    assert Tidy.of(without(run, 1, 3, 4, 5)).unfinished == [make_case().key]
    assert Tidy.of(without(run, 1, *range(6))).unfinished == [make_case().key]


def test_disturbed_rounds_are_missing_until_half_as_many_again_were_measured():
    def unfinished(repetitions):
        return Tidy.of(make_run([make_case()], rounds=6, repetitions=repetitions, covariates=steal_in(1, 4))).unfinished

    assert unfinished(5) == [make_case().key]
    assert unfinished(4) == []  # four are whole, and six were measured


def test_what_budget_left_of_a_cell_is_what_its_case_must_have():
    case = make_case()
    died = msgspec.structs.replace(fail(case, "failed", "the worker died"), worker_died=True)
    run = msgspec.structs.replace(make_run([case], rounds=3, repetitions=6), failures=[died])
    cut = CellPlan(cell=case.cell.key, repetitions=3, tokens_per_turn=32, spent_s=60.0)
    for plans, status, unfinished in [([], "failed", []), ([cut], "ok", [])]:
        tidy = Tidy.of(msgspec.structs.replace(run, cell_plans=plans))
        assert tidy.outcomes[case.key].status == status
        assert tidy.unfinished == unfinished
    repaired = msgspec.structs.replace(run, failures=[])
    assert Tidy.of(repaired).unfinished == [case.key]
    assert Tidy.of(msgspec.structs.replace(repaired, cell_plans=[cut])).unfinished == []
