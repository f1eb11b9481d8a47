import msgspec
import pytest

from bench.analysis.cautions import Caution, scope
from bench.analysis.cautions import cautions as cautions_of
from bench.analysis.summary import summarize
from bench.analysis.tidy import Tidy
from bench.record import Covariates
from tests.handmade import ENVIRONMENT, LOST, QUIET, grid, make_case, make_run, run_with_lossy_kinds

CASE = make_case()


def cautions(run):
    tidy = Tidy.of(run)
    return cautions_of(tidy, summarize(tidy))


def texts(run):
    return [(caution.case, caution.text) for caution in cautions(run) if "intervals hold" not in caution.text]


def test_a_quiet_run_of_six_processes_has_none():
    assert cautions(make_run(grid(["naive", "dynamic"], [32, 512]), processes=6)) == []


def test_one_process_is_said_once_for_the_run():
    (found,) = cautions(make_run(grid(["naive", "dynamic"], [32, 512])))
    assert found == Caution(
        case=None,
        text="the intervals hold within 1 process; processes differ by a few percent",
        advice="for intervals over processes measure with --processes 6",
    )


@pytest.mark.parametrize(
    ("count", "scope_text"), [(1, "within 1 process"), (5, "within 5 processes"), (6, "over 6 processes")]
)
def test_scope_says_where_an_interval_holds(count, scope_text):
    assert scope(count) == scope_text


def test_compile_time_in_a_first_step():
    def compiling(case, step):
        return 4000.0 if step == 1 else 100.0

    ((case, text),) = texts(make_run([CASE], ms=compiling, turn_noise=0, step_noise=0))
    assert case == CASE.key
    assert text == "a first decode step took 40 x the median step: probably one-time set-up or a stall"
    assert texts(make_run([CASE], ms=lambda _, step: 300.0 if step == 1 else 100.0)) == []
    stalling = make_run([CASE], ms=lambda _, step: 4000.0 if step in {1, 9} else 100.0)
    assert texts(stalling) == []  # not the first step alone: a machine that stalls


@pytest.mark.parametrize(("replays", "cautioned"), [(None, False), (True, False), (False, True)])
def test_steps_that_are_not_replayed(replays, cautioned):
    run = make_run([CASE], processes=6)
    run = msgspec.structs.replace(run, checks=[msgspec.structs.replace(check, replays=replays) for check in run.checks])
    found = [(caution.case, caution.text.partition(",")[0]) for caution in cautions(run)]
    expected = (CASE.key, "its decode steps could not be recorded")
    assert found == [expected] * cautioned


def test_an_interrupted_run_is_told_to_be_resumed_and_nothing_else_of_its_missing_rounds():
    run = make_run([CASE], rounds=6)
    torn = msgspec.structs.replace(run, samples=run.samples[:-2])
    assert texts(torn) == [(None, "the run was interrupted: 1 of 1 cases lack rounds")]
    (first, *_) = cautions(msgspec.structs.replace(run, samples=[]))
    assert first.advice == f"`kvbench run --resume {run.path}` adds them"


def machine(**fields):
    return msgspec.structs.replace(ENVIRONMENT, **fields)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (
            machine(cpu_quota=1.5, cores=1),
            "2 threads on a CPU quota of 1.5 cores are stopped once it is used up",
        ),
        (machine(cpu_quota=2.0), None),
        (
            machine(bound_cores=[0], bound_by="OMP_PROC_BIND=close"),
            "2 threads with the main thread bound to core 0 (OMP_PROC_BIND=close)",
        ),
        (machine(bound_cores=[0, 1], bound_by="OMP_PLACES={0,1}"), None),
    ],
)
def test_more_threads_than_a_quota_or_a_binding_leaves_are_said(environment, expected):
    assert texts(make_run([CASE], environment=environment)) == ([(None, expected)] if expected else [])
    gpu = msgspec.structs.replace(CASE, device="cuda")
    assert texts(make_run([gpu], environment=environment)) == []  # none of them computes there


def test_rounds_that_a_quota_stopped_are_disturbed():
    def throttled(_, number):
        return Covariates(throttled_periods=10, throttled_ns=10**9) if number < 3 else QUIET

    ((_, text),) = texts(make_run([CASE], rounds=10, repetitions=7, covariates=throttled))
    assert text == "30% of the rounds were disturbed by CPU steal or throttling: inconclusive"


def test_many_disturbed_rounds_are_inconclusive():
    def steal(share):
        return lambda _, number: Covariates(steal_ns=10**12) if number < share * 10 else QUIET

    assert texts(make_run([CASE], rounds=10, repetitions=7, covariates=steal(0.2))) == []
    ((case, text),) = texts(make_run([CASE], rounds=10, repetitions=7, covariates=steal(0.3)))
    assert case == CASE.key
    assert text == "30% of the rounds were disturbed by CPU steal or throttling: inconclusive"


def test_idle_arms_that_spin():
    def idle(share):
        return lambda *_: Covariates(idle_arms_ns=round(share * 32 * 100e6))

    def run(share):
        return make_run([CASE], ms=lambda *_: 100.0, turn_noise=0, step_noise=0, covariates=idle(share))

    assert texts(run(0.009)) == []
    tick = make_run([CASE], ms=lambda *_: 1.0, covariates=lambda *_: Covariates(idle_arms_ns=10_000_000))
    assert texts(tick) == []  # a third of so short a turn, and yet the counter's rounding
    ((_, text),) = texts(run(0.5))
    assert text == "the other strategies' processes, which should sleep, used over 1% of a core"


def test_a_wide_interval_and_a_missing_one():
    wide = texts(make_run([CASE], turn_noise=0.3))
    assert [text.split(" is ")[0] for _, text in wide] == ["the interval of prefill", "the interval of decode"]
    assert texts(make_run([CASE], rounds=4)) == [(CASE.key, "no interval: six undisturbed rounds are needed, it has 4")]


def test_the_advice_for_a_missing_interval_is_what_helps():
    """More rounds where few were asked for; where six were and too many were disturbed, six would not help."""

    def advice(run):
        return [caution.advice for caution in cautions(run) if "no interval" in caution.text]

    assert advice(make_run([CASE], rounds=4)) == ["measure with --repetitions 6 or more"]
    stolen = make_run(
        [CASE],
        rounds=9,
        repetitions=6,
        covariates=lambda _, number: Covariates(steal_ns=10**12) if number < 4 else QUIET,
    )
    assert advice(stolen) == ["measure again when the machine is quieter"]


def test_an_unfair_baseline():
    (found,) = texts(make_run([make_case("naive", naive_logits="all")]))
    assert found[0] is None
    assert found[1].startswith("naive computes the logits of every position")


def test_a_run_without_samples_was_interrupted_and_no_more():
    assert texts(make_run([CASE], rounds=0, warmups=0)) == [(None, "the run was interrupted: 1 of 1 cases lack rounds")]


def test_quality_that_says_little():
    run = run_with_lossy_kinds()
    poor = msgspec.structs.replace(LOST, top1_agreement=0.25, commonest_share=0.25)
    checks = [check if check.quality is None else msgspec.structs.replace(check, quality=poor) for check in run.checks]
    lossy = [check.case for check in checks if check.quality is not None]
    caution = "top1_agreement 0.25 is no better than always naming the commonest token (0.25)"
    assert [found for found in texts(msgspec.structs.replace(run, checks=checks)) if caution in found] == [
        (case, caution) for case in lossy
    ]
    assert not [text for _, text in texts(run) if "commonest" in text or "random" in text]


def test_quality_on_random_weights_is_said_once():
    caution = "the weights are random, so the quality of a lossy strategy says little of a trained model"
    run = make_run(grid(["dynamic", "fp8"], [100, 300], model="random:gpt2"))
    assert (None, caution) not in texts(run)  # nothing was judged
    checks = [msgspec.structs.replace(check, quality=LOST) for check in run.checks]
    assert texts(msgspec.structs.replace(run, checks=checks)).count((None, caution)) == 1


@pytest.mark.parametrize(
    ("grown", "reached", "is_said"),
    [(30e6, 23e6, True), (24e6, 23e6, False), (3e6, 1e5, False), (4e6, 1e5, True), (None, 23e6, False)],
)
def test_a_process_that_grows_by_more_than_its_cache(grown, reached, is_said):
    run = make_run(grid(["dynamic"], [100]))
    checks = [
        msgspec.structs.replace(check, growth_bytes=grown, kv_bytes_allocated_after_decode=reached)
        for check in run.checks
    ]
    cautions = [text for _, text in texts(msgspec.structs.replace(run, checks=checks)) if "grew by" in text]
    assert bool(cautions) == is_said
    if is_said:
        assert cautions[0].startswith(f"its process grew by {grown / 1e6:.1f} MB while the cache was filled")
        assert cautions[0].endswith("kv_bytes_allocated may be too small")


def test_a_lossy_case_that_could_not_be_judged_says_so():
    run = run_with_lossy_kinds()
    checks = [msgspec.structs.replace(check, quality=None, depends_on_later=True) for check in run.checks]
    unjudged = [check.case for check in checks if not check.exact]
    found = texts(msgspec.structs.replace(run, checks=checks))
    assert [case for case, text in found if "depend on later ones" in text] == list(dict.fromkeys(unjudged))
