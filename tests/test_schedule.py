"""The order of the turns: correctness first, arms interleaved in alternating directions, failures apart. No clock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import msgspec
import pytest

from bench import schedule
from bench.arm import ArmFailed
from bench.case import Case, Group
from bench.protocol import CheckCase, Checked, Done, Load, Loaded, MakeReference, Request, TakeTurn, TurnTaken
from bench.record import Check, Covariates, Failure, Record, Run, Sample
from bench.schedule import Options, measure
from tests.handmade import grid, make_plan, make_run

ARMS: list[FakeArm] = []


class FakeArm:
    """Answers at once, notes every request in `log`, and fails where `failures` says so."""

    log: ClassVar[list[tuple[str, str]]] = []
    failures: ClassVar[dict[tuple[str, str, int], ArmFailed]] = {}
    """(strategy, request, how many of its kind came before) -> what is raised."""
    matches: ClassVar[dict[str, str]] = {}
    times_ns: ClassVar[dict[str, list[int]]] = {}

    def __init__(self, group: Group) -> None:
        self.group, self.alive, self.cpu_ns, self.strategy = group, True, 0, "?"
        ARMS.append(self)
        self.log.append(("start", ""))

    def ask(self, request: Request, timeout_s: float) -> object:
        assert timeout_s > 0
        kind = type(request).__name__
        if isinstance(request, Load):
            self.strategy = request.strategy
        before = self.log.count((kind, self.strategy))
        self.log.append((kind, self.strategy))
        failure = self.failures.get((self.strategy, kind, before))
        if failure is not None:
            self.alive = failure.alive
            raise failure
        match request:
            case Load():
                return Loaded(version=1, code="")
            case MakeReference():
                return Done()
            case CheckCase():
                return Checked(
                    tokens_match=self.matches.get(self.strategy, "true"),  # type: ignore[arg-type]
                    logits_error=1e-6,
                    positions_checked=4,
                    kv_bytes_after_prefill=8,
                    kv_bytes_after_decode=16,
                    peak_memory_bytes=None,
                    compile_s=None,
                )
            case TakeTurn():
                times = self.times_ns.get(self.strategy, [])
                return TurnTaken(
                    prefill_ns=times.pop(0) if times else 1000,
                    steps=[1],
                    step_ns=[10],
                    prefill_event_ns=None,
                    step_event_ns=None,
                    covariates=Covariates(),
                )

    def death(self) -> ArmFailed:
        return ArmFailed("oom", "the worker was killed", alive=False)

    def __enter__(self) -> FakeArm:
        return self

    def __exit__(self, *_: object) -> None:
        self.alive = False


class Memory:
    """A writer and a progress at once."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.said: list[str] = []

    def append(self, record: Record) -> None:
        self.records.append(record)

    def expect(self, seconds: float) -> None: ...

    def done(self, seconds: float, took_s: float | None, case: Case) -> None: ...

    def say(self, text: str) -> None:
        self.said.append(text)

    def of(self, kind: type) -> list[Any]:
        return [record for record in self.records if isinstance(record, kind)]


@pytest.fixture(autouse=True)
def _fake_arms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "Arm", FakeArm)
    ARMS.clear()
    FakeArm.log, FakeArm.failures, FakeArm.matches, FakeArm.times_ns = [], {}, {}, {}


def measured(cases: Sequence[Case], previous: Run | None = None, **options: Any) -> Memory:
    memory = Memory()
    measure([make_plan(case) for case in cases], Options(**options), memory, memory, previous)
    return memory


def turns(kind: str = "TakeTurn") -> list[str]:
    return [strategy for request, strategy in FakeArm.log if request == kind]


CASES = grid(["naive", "dynamic", "static"], [8])


def test_correctness_comes_before_any_time() -> None:
    measured(CASES, repetitions=2)
    kinds = [kind for kind, _ in FakeArm.log if kind not in ("start", "Load")]
    assert kinds[:4] == ["MakeReference", "CheckCase", "CheckCase", "CheckCase"]
    assert set(kinds[4:]) == {"TakeTurn"}


def test_rounds_alternate_their_direction() -> None:
    memory = measured(CASES, repetitions=3)
    timed = [(s.round, s.case.split()[1]) for s in memory.of(Sample) if not s.warmup]
    there, back = ["naive", "dynamic", "static"], ["static", "dynamic", "naive"]
    assert timed == [(0, n) for n in there] + [(1, n) for n in back] + [(2, n) for n in there]
    assert [sample.order for sample in memory.of(Sample)] == list(range(len(memory.of(Sample))))


def test_warm_up_ends_when_two_turns_agree() -> None:
    FakeArm.times_ns = {"naive": [9000, 5000, 1010, 1000]}
    memory = measured(CASES[:1], repetitions=1)
    warm = [sample.prefill_ns for sample in memory.of(Sample) if sample.warmup]
    # 1010 and 1000 agree within five percent, yet the times still fell: one more, up to the most.
    assert warm == [9000, 5000, 1010, 1000]


def test_warm_up_never_exceeds_its_most() -> None:
    FakeArm.times_ns = {"naive": [2**n for n in range(20, 0, -1)]}
    memory = measured(CASES[:1], repetitions=1)
    assert sum(sample.warmup for sample in memory.of(Sample)) == schedule.WARMUP_TRIALS


def test_other_tokens_get_no_time() -> None:
    FakeArm.matches = {"dynamic": "false"}
    memory = measured(CASES, repetitions=2)
    assert "dynamic" not in turns()
    assert turns().count("static") > 0
    (failure,) = memory.of(Failure)
    assert (failure.status, failure.tokens_match) == ("failed", "false")
    assert "logits differ" in failure.error


@pytest.mark.parametrize("status", ["failed", "oom", "timeout", "unsupported"])
def test_one_failure_loses_one_arm(status: Any) -> None:
    FakeArm.failures = {("dynamic", "TakeTurn", 3): ArmFailed(status, "gone", alive=False)}
    memory = measured(grid(["naive", "dynamic"], [8, 16]), repetitions=4)
    (failure,) = memory.of(Failure)
    assert (failure.status, failure.error) == (status, "gone")
    rounds = [sample for sample in memory.of(Sample) if not sample.warmup and "p8 " in sample.case]
    assert sum("naive" in sample.case for sample in rounds) == 4
    assert sum("dynamic" in sample.case for sample in rounds) < 4
    # The next cell gets a new worker, loaded again.
    assert turns("Load") == ["", "naive", "dynamic", "dynamic"]
    later = [sample for sample in memory.of(Sample) if not sample.warmup and "p16 " in sample.case]
    assert len(later) == 8


def test_without_a_reference_nothing_is_timed() -> None:
    FakeArm.failures = {("", "MakeReference", 0): ArmFailed("oom", "too large", alive=True)}
    memory = measured(CASES)
    assert not turns()
    assert [failure.status for failure in memory.of(Failure)] == ["oom"] * 3
    assert "parallel forward" in memory.of(Failure)[0].error


def test_processes_are_fresh_sets_of_workers() -> None:
    memory = measured(CASES, repetitions=1, processes=2)
    assert FakeArm.log.count(("start", "")) == 8  # three strategies and the reference's, twice
    assert {sample.process for sample in memory.of(Sample)} == {0, 1}


def interrupted(n_samples: int, **changes: Any) -> Run:
    """A run of CASES that was killed after so many samples."""
    run = make_run(CASES, rounds=3, warmups=1)
    return msgspec.structs.replace(run, samples=run.samples[:n_samples], **changes)


def test_resume_measures_only_what_is_missing() -> None:
    whole = interrupted(12)
    assert not measured(CASES, whole, repetitions=3).records
    assert FakeArm.log == []

    torn = interrupted(3 + 3 + 2)  # warm-ups, one whole round, two turns of the next
    memory = measured(CASES, torn, repetitions=3)
    rounds = [sample.round for sample in memory.of(Sample) if not sample.warmup]
    assert rounds == [2, 2, 2, 3, 3, 3]  # round 1 stays torn: a pair is never made of two sessions
    assert min(sample.order for sample in memory.of(Sample)) == 8


def test_resume_does_not_try_a_failure_again() -> None:
    lost = Failure(case=CASES[1].key, process=0, status="timeout", error="slow")
    memory = measured(CASES, interrupted(3, failures=[lost]), repetitions=2)
    assert "dynamic" not in turns()
    assert len([sample for sample in memory.of(Sample) if not sample.warmup]) == 4


def test_worker_that_died_asleep_is_not_given_a_turn_anew() -> None:
    """A new worker would know nothing of the case: the death is the result, and the next cell starts one."""

    class Sniper(Memory):
        def append(self, record: Record) -> None:
            super().append(record)
            if len(self.of(Check)) == 1 and not self.of(Sample):
                next(arm for arm in ARMS if arm.strategy == "naive").alive = False

    memory = Sniper()
    measure([make_plan(case) for case in CASES], Options(repetitions=2), memory, memory)
    (failure,) = memory.of(Failure)
    assert (failure.status, failure.worker_died) == ("oom", True)
    assert "naive" not in turns()
    assert turns("Load") == ["", "naive", "dynamic", "static"]


def test_resume_tries_a_dead_worker_again() -> None:
    died = Failure(case=CASES[1].key, process=0, status="oom", error="killed", worker_died=True)
    memory = measured(CASES, interrupted(3, failures=[died]), repetitions=2)
    assert turns().count("dynamic") >= 2
    assert not memory.of(Failure)


def test_checks_are_stored_once_per_case_and_process() -> None:
    memory = measured(CASES, repetitions=1, processes=2)
    assert len(memory.of(Check)) == 6
