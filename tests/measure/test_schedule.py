"""The order of the turns: correctness first, directions that alternate, one failure loses one case. No clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import msgspec
import pytest

from bench.case import Case
from bench.errors import UsageError
from bench.manifest import TextFile
from bench.measure import schedule
from bench.measure.plan import Limits
from bench.measure.schedule import CEILING_AGE_S, measure
from bench.measure.worker_process import WorkerFailed
from bench.protocol import (
    CeilingsChosen,
    CeilingTurnTaken,
    CheckCase,
    Checked,
    ChooseCeilings,
    Done,
    FrameworkTimed,
    Judge,
    Judged,
    Load,
    Loaded,
    MakeReference,
    MakeText,
    Request,
    TakeCeilingTurn,
    TakeTurn,
    TextMade,
    TimeFramework,
    TurnTaken,
)
from bench.record import CeilingSample, CellPlan, Check, Covariates, Failure, Record, Run, Sample, Text
from kvcache.strategies.catalogue import is_lossy
from tests.handmade import LOST, grid, make_ceiling, make_plan, make_run

ARMS: list[FakeArm] = []


class FakeArm:
    """Answers at once, notes every request in `log`, and fails where `failures` says so."""

    log: ClassVar[list[tuple[str, str]]] = []
    failures: ClassVar[dict[tuple[str, str, int], WorkerFailed]] = {}
    """(strategy, request, how many of its kind came before) -> what is raised."""
    matches: ClassVar[dict[str, str]] = {}
    times_ns: ClassVar[dict[str, list[int]]] = {}
    stolen: ClassVar[set[tuple[str, int]]] = set()
    """(strategy, turn): the hypervisor takes all of its time."""

    def __init__(self) -> None:
        self.alive, self.cpu_ns, self.strategy = True, 0, "?"
        ARMS.append(self)
        self.log.append(("start", ""))

    def ask(self, request: Request, timeout_s: float) -> object:
        assert timeout_s > 0
        kind = type(request).__name__
        if isinstance(request, Load):
            self.strategy = request.strategy
        if isinstance(request, ChooseCeilings):
            self.strategy = "ceilings"
        before = self.log.count((kind, self.strategy))
        self.log.append((kind, self.strategy))
        failure = self.failures.get((self.strategy, kind, before))
        if failure is not None:
            self.alive = failure.alive
            raise failure
        return self.answer(request)

    def send(self, request: Request) -> None:
        self.sent = request

    def receive(self, timeout_s: float) -> object:
        return self.ask(self.sent, timeout_s)

    def answer(self, request: Request) -> object:
        match request:
            case Load():
                return Loaded(version=1, code="")
            case MakeReference():
                return Done()
            case MakeText():
                written = TextMade(writer=request.writer, tokens=[[1, 2, 3]])
                return written if request.tokens is None else TextMade()
            case Judge():
                return Judged(spent_s=1.0)
            case CheckCase():
                return Checked(
                    tokens_match=self.matches.get(self.strategy, "true"),  # type: ignore[arg-type]
                    logits_error=1e-6,
                    positions_checked=4,
                    kv_bytes_after_prefill=8,
                    kv_bytes_after_decode=16,
                    peak_memory_bytes=None,
                    compile_s=None,
                    counters={},
                    quality=LOST if is_lossy(self.strategy) else None,
                )
            case TakeTurn():
                times = self.times_ns.get(self.strategy, [])
                turn = self.log.count(("TakeTurn", self.strategy)) - 1
                return TurnTaken(
                    prefill_ns=times.pop(0) if times else 1000,
                    steps=[1],
                    step_ns=[10],
                    prefill_event_ns=None,
                    step_event_ns=None,
                    covariates=Covariates(steal_ns=10**9 if (self.strategy, turn) in self.stolen else 0),
                )
            case TimeFramework():
                return FrameworkTimed(step_ns=[5, 6])
            case ChooseCeilings():
                return CeilingsChosen(kernels={"read_bandwidth": "dot", "gemm": "mm"})
            case TakeCeilingTurn():
                return CeilingTurnTaken(
                    kernel="dot", amount=100, pass_ns=[7, 8], cache_bytes=1, covariates=Covariates()
                )

    def death(self) -> WorkerFailed:
        return WorkerFailed("oom", "the worker was killed", alive=False)

    def __enter__(self) -> FakeArm:
        return self

    def __exit__(self, *_: object) -> None:
        self.alive = False


class Memory:
    """A writer and a progress at once."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.said: list[str] = []
        self.expected = self.begun = self.done = 0.0

    def append(self, record: Record) -> None:
        self.records.append(record)

    def expect(self, total: float) -> None:
        self.expected = total

    def begin(self, title: str, amount: float) -> None:
        self.begun += amount

    def advance(self, amount: float, detail: str = "") -> None:
        self.done += amount

    def say(self, text: str) -> None:
        self.said.append(text)

    def of(self, kind: type) -> list[Any]:
        return [record for record in self.records if isinstance(record, kind)]


unforkable: set[int] = set()
"""Which forks of a run fail: they are counted from 0."""


def fake_arm(model: str, n_threads: int, process: int) -> Any:
    number = len(ARMS)
    if number in unforkable:
        unforkable.remove(number)
        raise WorkerFailed("failed", "no worker could be forked", alive=False)
    return FakeArm()


@pytest.fixture(autouse=True)
def _fake_arms() -> None:
    ARMS.clear()
    unforkable.clear()
    FakeArm.log, FakeArm.failures, FakeArm.matches, FakeArm.times_ns, FakeArm.stolen = [], {}, {}, {}, set()


def measured(cases: Sequence[Case], previous: Run | None = None, **options: Any) -> Memory:
    memory = Memory()
    measure([make_plan(case) for case in cases], Limits(**options), memory, memory, fake_arm, previous)
    return memory


def turns(kind: str = "TakeTurn") -> list[str]:
    return [strategy for request, strategy in FakeArm.log if request == kind]


CASES = grid(["naive", "dynamic", "static"], [8])


def test_correctness_comes_before_any_time() -> None:
    measured(CASES, repetitions=2)
    kinds = [kind for kind, _ in FakeArm.log if kind not in ("start", "Load")]
    untimed, timed = ["MakeReference", *["CheckCase"] * 3], ["TakeTurn"] * 3 * 2
    assert kinds == [*untimed, *timed, *["TimeFramework"] * 3, *timed]  # warm-ups; rounds


def watched(run: Callable[[], Memory]) -> tuple[Memory, list[Request]]:
    """What a run stored, and every request of it."""
    asked: list[Request] = []
    honest = FakeArm.answer

    def noting(self: FakeArm, request: Request) -> object:
        asked.append(request)
        return honest(self, request)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeArm, "answer", noting)
        return run(), asked


def test_a_text_is_written_once_and_then_judges_the_lossy_cases_of_every_cell_alone() -> None:
    FakeArm.matches = {"fp8": "false"}
    cases = grid(["dynamic", "fp8", "cache:mine:make"], [8, 16])
    memory, asked = watched(lambda: measured(cases, repetitions=1, processes=2))
    made = [request for request in asked if isinstance(request, MakeText)]
    assert [(request.writer, request.n_context, request.tokens) for request in made[:1]] == [("dynamic", 16, None)]
    assert [(request.case.n_prompt, request.tokens) for request in made[1:]] == [(n, [[1, 2, 3]]) for n in (16, 8, 16)]
    judged = [request.case.strategy for request in asked if isinstance(request, Judge)]
    assert judged == ["fp8", "cache:mine:make"] * 4
    assert memory.of(Failure) == []
    (text,) = memory.of(Text)
    assert (text.case, text.writer, text.tokens) == (cases[1].key, "dynamic", [[1, 2, 3]])
    judges = {check.quality.writer for check in memory.of(Check) if check.quality is not None}
    assert judges == {"dynamic"}


def test_a_text_is_for_one_batch_size_and_written_by_the_fastest_exact_strategy() -> None:
    cases = [*grid(["fp8", "compiled"], [8]), *grid(["fp8"], [8], batch_size=2)]
    memory, asked = watched(lambda: measured(cases, repetitions=1))
    assert [request.writer for request in asked if isinstance(request, MakeText)] == ["compiled", "dynamic"]
    assert [text.case for text in memory.of(Text)] == [cases[0].key, cases[2].key]


def test_a_text_that_an_interrupted_run_wrote_judges_the_rest() -> None:
    cases = grid(["dynamic", "fp8"], [8, 16])
    done = make_run(cases[:2], rounds=1)
    past = msgspec.structs.replace(done, texts=[Text(case=cases[1].key, writer="dynamic", tokens=[[7, 8]])])
    memory, asked = watched(lambda: measured(cases, past, repetitions=1))
    assert [request.tokens for request in asked if isinstance(request, MakeText)] == [[[7, 8]]]
    assert memory.of(Text) == []


def test_where_the_longest_text_fails_each_cell_gets_one_of_its_own_length() -> None:
    FakeArm.failures[("", "MakeText", 0)] = WorkerFailed("timeout", "no reply", alive=False)
    cases = grid(["dynamic", "fp8"], [8, 16, 32])
    memory, asked = watched(lambda: measured(cases, repetitions=1))
    made = [(request.n_context, request.tokens) for request in asked if isinstance(request, MakeText)]
    assert made == [(8, None), (16, None)]  # the first, of 32, failed; it is not tried again for the cell of 32
    assert [text.n_context for text in memory.of(Text)] == [8, 16]
    (failure,) = memory.of(Failure)
    assert (failure.case, failure.status) == (cases[5].key, "timeout")


def test_a_text_is_no_longer_than_what_the_budget_leaves() -> None:
    cases = grid(["dynamic", "fp8"], [8, 16])
    left_out = CellPlan(cell=cases[2].cell.key, repetitions=0, tokens_per_turn=1, left_out="no time", spent_s=0.0)
    past = msgspec.structs.replace(make_run(cases[:0]), cell_plans=[left_out])
    _, asked = watched(lambda: measured(cases, past, repetitions=1, budget_min=60))
    assert [request.n_context for request in asked if isinstance(request, MakeText)] == [8]


def test_the_users_own_text_is_shared_out_to_the_sequences() -> None:
    cases = grid(["dynamic", "fp8"], [8], batch_size=2)
    file = TextFile(path="mine.txt", digest="5f" * 32, tokens={cases[0].model: [1, 2, 3, 4, 5]})

    def run() -> Memory:
        memory = Memory()
        measure([make_plan(case) for case in cases], Limits(repetitions=1), memory, memory, fake_arm, text=file)
        return memory

    memory, asked = watched(run)
    assert [request.tokens for request in asked if isinstance(request, MakeText)] == [[[1, 2], [3, 4]]]
    assert memory.of(Text) == []
    assert [check.quality.writer for check in memory.of(Check) if check.quality is not None] == ["--text"]


def test_without_a_text_the_lossy_cases_fail_with_the_reason_and_the_others_are_measured() -> None:
    FakeArm.failures[("", "MakeText", 0)] = WorkerFailed("oom", "too large", alive=True)
    memory = measured(grid(["dynamic", "fp8"], [8]), repetitions=1)
    (failure,) = memory.of(Failure)
    assert (failure.status, failure.error) == ("oom", "making the text that judges it failed: too large")
    assert {sample.case.split()[1] for sample in memory.of(Sample)} == {"dynamic"}


def test_eager_kinds_share_the_threads_while_they_are_judged_and_one_failure_ends_one_case() -> None:
    FakeArm.failures["sink-window", "Judge", 0] = WorkerFailed("oom", "too large", alive=False)
    kinds = ["compiled-int8", "fp8", "sink-window", "cache:mine:make", "hqq-int4"]
    memory, asked = watched(lambda: measured(grid(kinds, [8]), repetitions=1))
    shared, alone = {"fp8": 1, "hqq-int4": 2}, {"compiled-int8": 2, "cache:mine:make": 2}
    assert {r.case.strategy: r.n_threads for r in asked if isinstance(r, Judge)} == shared | alone
    (failure,) = memory.of(Failure)
    assert failure.case.split()[1] == "sink-window"
    assert {sample.case.split()[1] for sample in memory.of(Sample)} == {*shared, *alone}


def test_the_framework_is_timed_once_for_a_worker_and_batch_and_told_with_every_case() -> None:
    cases = [*grid(["dynamic"], [8], n_gen=1), *grid(["dynamic"], [8, 16], n_gen=4)]
    memory = measured([*cases, *grid(["dynamic"], [8], batch_size=2)])
    assert turns("TimeFramework") == ["dynamic"] * 2
    assert [check.framework_step_ns for check in memory.of(Check)] == [None, [5, 6], [5, 6], [5, 6]]


def test_a_framework_that_cannot_be_timed_costs_a_line_and_no_case() -> None:
    FakeArm.failures["dynamic", "TimeFramework", 0] = WorkerFailed("failed", "RuntimeError: other shapes", alive=True)
    memory = measured(CASES)
    assert memory.of(Failure) == []
    assert [check.framework_step_ns for check in memory.of(Check)] == [[5, 6], None, [5, 6]]
    assert [said for said in memory.said if "framework_ms" in said] == [
        "no framework_ms for dynamic, prompt 8: RuntimeError: other shapes"
    ]


def test_a_worker_that_ends_while_its_framework_is_timed_fails_its_case_alone() -> None:
    FakeArm.failures["dynamic", "TimeFramework", 0] = WorkerFailed("timeout", "no answer", alive=False)
    memory = measured(CASES)
    (failure,) = memory.of(Failure)
    assert (failure.case, failure.error) == (CASES[1].key, "timing the framework: no answer (what --timeout left)")
    assert {sample.case for sample in memory.of(Sample) if not sample.warmup} == {CASES[0].key, CASES[2].key}


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


@pytest.mark.parametrize("status", [None, "failed", "timeout"])
def test_the_cells_are_all_the_work_that_was_expected(status: Any) -> None:
    """Whether cases take more warm-ups or none, or fail on the way."""
    FakeArm.times_ns = {"naive": [9000, 5000, 1010, 1000]}
    if status is not None:
        FakeArm.failures = {("dynamic", "TakeTurn", 3): WorkerFailed(status, "gone", alive=False)}
    memory = measured(grid(["naive", "dynamic"], [8, 16]), repetitions=4, ceilings=True)
    assert memory.expected == pytest.approx(memory.begun)
    assert memory.done > 0


def test_warm_up_never_exceeds_its_most() -> None:
    FakeArm.times_ns = {"naive": [2**n for n in range(20, 0, -1)]}
    memory = measured(CASES[:1], repetitions=1)
    assert sum(sample.warmup for sample in memory.of(Sample)) == schedule.WARMUP_TRIALS


def test_a_budget_learns_from_rounds_where_a_long_check_leaves_no_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "WARMUP_S", -1.0)
    FakeArm.times_ns = {"naive": [10**13] * 6}
    memory = measured(grid(["naive"], [8, 16]), repetitions=6, budget_min=1.0)
    assert len(memory.of(Sample)) == 6
    assert not any(sample.warmup for sample in memory.of(Sample))
    first, second = memory.of(CellPlan)
    assert first.left_out is None
    assert "left out" in str(second.left_out)


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
    FakeArm.failures = {("dynamic", "TakeTurn", 3): WorkerFailed(status, "gone", alive=False)}
    memory = measured(grid(["naive", "dynamic"], [8, 16]), repetitions=4)
    (failure,) = memory.of(Failure)
    assert failure.status == status
    assert failure.error == ("gone (what --timeout left)" if status == "timeout" else "gone")
    rounds = [sample for sample in memory.of(Sample) if not sample.warmup and "p8 " in sample.case]
    assert sum("naive" in sample.case for sample in rounds) == 4
    assert sum("dynamic" in sample.case for sample in rounds) < 4
    # The next cell gets a new worker, loaded again.
    assert turns("Load") == ["", "naive", "dynamic", "dynamic"]
    later = [sample for sample in memory.of(Sample) if not sample.warmup and "p16 " in sample.case]
    assert len(later) == 8


def test_without_a_reference_nothing_is_timed() -> None:
    FakeArm.failures = {("", "MakeReference", 0): WorkerFailed("oom", "too large", alive=True)}
    memory = measured(CASES)
    assert not turns()
    assert [failure.status for failure in memory.of(Failure)] == ["oom"] * 3
    assert "parallel forward" in memory.of(Failure)[0].error


def test_a_model_of_which_nothing_can_be_proved_is_bad_input() -> None:
    reason = WorkerFailed("unsupported", "it does not repeat itself", alive=True, of_model=True)
    FakeArm.failures = {("", "MakeReference", 0): reason}
    with pytest.raises(UsageError, match=r"--model \S+: it does not repeat itself"):
        measured(CASES)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_beside_other_models_such_a_model_is_unsupported_and_the_others_are_measured(number: int) -> None:
    reason = WorkerFailed("unsupported", "it does not repeat itself", alive=True, of_model=True)
    FakeArm.failures = {("", "MakeReference", number): reason}
    models = ["first", "second", "third"]
    memory = measured([case for model in models for case in grid(["naive", "dynamic"], [8], model=model)])
    assert [failure.status for failure in memory.of(Failure)] == ["unsupported"] * 2
    refused = models.pop(number)
    assert all(failure.case.startswith(f"{refused} ") for failure in memory.of(Failure))
    assert {sample.case.split()[0] for sample in memory.of(Sample)} == set(models)


@pytest.mark.parametrize("previous", [None, make_run(CASES[:0], rounds=1, plan=make_plan)])
def test_once_something_is_stored_such_a_model_is_unsupported(previous: Run | None) -> None:
    reason = WorkerFailed("unsupported", "it does not repeat itself", alive=True, of_model=True)
    FakeArm.failures = {("", "MakeReference", 0 if previous else 1): reason}
    memory = measured(grid(["naive", "dynamic"], [8, 16]), previous)
    assert [failure.status for failure in memory.of(Failure)] == ["unsupported"] * 2
    assert len({sample.case for sample in memory.of(Sample)}) == 2


def test_other_tokens_where_positions_depend_on_later_ones_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = FakeArm.answer

    def depending(arm: FakeArm, request: Request) -> object:
        reply = answer(arm, request)
        return msgspec.structs.replace(reply, depends_on_later=True) if isinstance(reply, Checked) else reply

    monkeypatch.setattr(FakeArm, "answer", depending)
    FakeArm.matches = {"dynamic": "false"}
    (failure,) = measured(CASES).of(Failure)
    assert ": earlier positions of this model depend on later ones, and a cache keeps them" in failure.error


@pytest.mark.parametrize(("rounding", "source"), [(None, "the parallel forward's"), (0.0, "naive's")])
def test_other_tokens_name_whose_logits_they_were_compared_with(
    rounding: float | None, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding of 0: the parallel forwards settled on no tokens, and no logits of theirs were far from naive's."""
    answer = FakeArm.answer

    def by_naive(arm: FakeArm, request: Request) -> object:
        reply = answer(arm, request)
        if not isinstance(reply, Checked) or rounding is None:
            return reply
        return msgspec.structs.replace(reply, reference_by_naive=True, reference_rounding=rounding)

    monkeypatch.setattr(FakeArm, "answer", by_naive)
    FakeArm.matches = {"dynamic": "false"}
    (failure,) = measured(CASES).of(Failure)
    assert f"logits differ from {source} by" in failure.error
    assert "rounding" not in failure.error


def test_other_tokens_where_rounding_moves_the_model_itself_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = FakeArm.answer

    def rounding(arm: FakeArm, request: Request) -> object:
        reply = answer(arm, request)
        moved = {"reference_by_naive": True, "reference_rounding": 0.05}
        return msgspec.structs.replace(reply, **moved) if isinstance(reply, Checked) else reply

    monkeypatch.setattr(FakeArm, "answer", rounding)
    FakeArm.matches = {"dynamic": "false"}
    (failure,) = measured(CASES).of(Failure)
    assert "logits differ from naive's by" in failure.error
    assert "; rounding in float32 alone moves naive's own by 5.0e-02" in failure.error


def test_a_worker_that_cannot_be_forked_costs_one_case_and_is_forked_for_the_next() -> None:
    unforkable.add(2)  # after the reference and naive
    memory = measured(grid(["naive", "dynamic"], [8, 16]), repetitions=1)
    (failure,) = memory.of(Failure)
    assert (failure.case.split()[1], failure.error) == ("dynamic", "no worker could be forked")
    timed_cases = {sample.case for sample in memory.of(Sample) if not sample.warmup}
    assert timed_cases == {case.key for case in grid(["naive", "dynamic"], [8, 16])} - {failure.case}


def test_without_a_forked_reference_one_cell_fails() -> None:
    unforkable.add(0)
    memory = measured(grid(["naive", "dynamic"], [8, 16]), repetitions=1)
    assert ["p8 " in failure.case for failure in memory.of(Failure)] == [True, True]
    assert len([sample for sample in memory.of(Sample) if not sample.warmup]) == 2


def test_ceilings_whose_worker_cannot_be_forked_lose_no_case() -> None:
    unforkable.add(1)  # after the reference
    memory = measured(CASES, repetitions=1, ceilings=True)
    assert not memory.of(Failure)
    assert len([sample for sample in memory.of(Sample) if not sample.warmup]) == 3
    assert memory.said == ["no ceilings from here on, so no MFU, MBU or prediction: no worker could be forked"]


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
            if len(self.of(Check)) == 1:
                next(arm for arm in ARMS if arm.strategy == "naive").alive = False

    memory = Sniper()
    measure([make_plan(case) for case in CASES], Limits(repetitions=2), memory, memory, fake_arm)
    (failure,) = memory.of(Failure)
    assert (failure.status, failure.worker_died) == ("oom", True)
    assert turns().count("naive") == WARM_UPS
    assert turns("Load") == ["", "naive", "dynamic", "static"]


def test_resume_tries_a_dead_worker_again() -> None:
    died = Failure(case=CASES[1].key, process=0, status="oom", error="killed", worker_died=True)
    memory = measured(CASES, interrupted(3, failures=[died]), repetitions=2)
    assert turns().count("dynamic") >= 2
    assert not memory.of(Failure)


WARM_UPS = 2
"""Turns that agree at once."""


def rounds_of(memory: Memory) -> list[int]:
    return sorted({sample.round for sample in memory.of(Sample) if not sample.warmup})


def test_a_round_that_the_machine_disturbed_is_replaced() -> None:
    FakeArm.stolen = {("naive", WARM_UPS + 1), ("dynamic", 0)}  # round 1; and a warm-up, which counts for nothing
    memory = measured(CASES, repetitions=4)
    assert rounds_of(memory) == [0, 1, 2, 3, 4]
    assert not [said for said in memory.said if "undisturbed" in said]


def test_at_most_half_as_many_rounds_are_replaced_and_then_the_run_says_so() -> None:
    FakeArm.stolen = {("static", WARM_UPS + number) for number in range(1, 100)}
    memory = measured(CASES, repetitions=4)
    assert rounds_of(memory) == [0, 1, 2, 3, 4, 5]
    (said,) = memory.said
    assert "1 of 4 rounds are undisturbed" in said


def test_resume_replaces_disturbed_rounds_as_far_as_the_run_itself_would() -> None:
    whole = interrupted(12)  # warm-ups and three rounds of three cases
    stolen = [
        msgspec.structs.replace(sample, covariates=Covariates(steal_ns=10**9)) if sample.round == 1 else sample
        for sample in whole.samples
    ]
    memory = measured(CASES, msgspec.structs.replace(whole, samples=stolen), repetitions=3)
    assert rounds_of(memory) == [3]
    FakeArm.stolen = {("naive", WARM_UPS)}
    FakeArm.log.clear()
    memory = measured(CASES, msgspec.structs.replace(whole, samples=stolen), repetitions=3)
    assert rounds_of(memory) == [3]  # 3 + 3 // 2 is the most


def test_checks_are_stored_once_per_case_and_process() -> None:
    memory = measured(CASES, repetitions=1, processes=2)
    assert len(memory.of(Check)) == 6


def timed(memory: Memory) -> list[tuple[int, str]]:
    """Round, and strategy or ceiling, of every turn that is no warm-up, in the order of writing."""
    return [
        (record.round, record.ceiling if isinstance(record, CeilingSample) else record.case.split()[1])
        for record in memory.records
        if isinstance(record, Sample | CeilingSample) and not record.warmup
    ]


def test_ceilings_have_turns_in_every_round_that_alternate_with_the_cases() -> None:
    memory = measured(CASES, repetitions=3, ceilings=True)
    there = ["read_bandwidth", "gemm", "naive", "dynamic", "static"]
    expected = [(number, name) for number in range(3) for name in (there if number % 2 == 0 else reversed(there))]
    assert timed(memory) == expected
    assert [record.order for record in memory.records if not isinstance(record, Check)] == list(range(5 * 3 + 2 + 6))
    assert {taken.cell for taken in memory.of(CeilingSample)} == {CASES[0].cell.key}
    assert (memory.of(CeilingSample)[0].amount, memory.of(CeilingSample)[0].pass_ns) == (100, [7, 8])


def test_after_a_long_turn_the_ceilings_have_theirs() -> None:
    warm_ups = 2
    FakeArm.times_ns = {"naive": [round(1.1e9 * CEILING_AGE_S)] * (warm_ups + 2), "dynamic": [10**6] * (warm_ups + 2)}
    memory = measured(CASES[:2], repetitions=2, ceilings=True)
    there, back = ["read_bandwidth", "gemm"], ["gemm", "read_bandwidth"]
    assert [name for number, name in timed(memory) if number == 0] == [*there, "naive", *there, "dynamic"]
    # What a turn of dynamic left over is no reason for another turn; nothing came since those after naive.
    assert [name for number, name in timed(memory) if number == 1] == ["dynamic", "naive", *back]


def test_kernels_are_chosen_once_per_process_and_warmed_up_once_per_cell() -> None:
    memory = measured(grid(["naive", "dynamic"], [8, 16]), repetitions=1, processes=2, ceilings=True)
    assert len(turns("ChooseCeilings")) == 2
    warm = [taken for taken in memory.of(CeilingSample) if taken.warmup]
    assert len(warm) == 2 * 2 * 2
    kinds = [kind for kind, _ in FakeArm.log]
    assert kinds.index("ChooseCeilings") > kinds.index("TakeTurn")  # when all the workers have loaded


@pytest.mark.parametrize("request_kind", ["ChooseCeilings", "TakeCeilingTurn"])
def test_a_failed_ceiling_loses_no_case_and_is_told_once(request_kind: str) -> None:
    FakeArm.failures = {("ceilings", request_kind, 0): WorkerFailed("failed", "no such kernel", alive=True)}
    memory = measured(grid(["naive", "dynamic"], [8, 16]), repetitions=2, ceilings=True)
    assert len([sample for sample in memory.of(Sample) if not sample.warmup]) == 8
    assert not memory.of(Failure)
    assert not memory.of(CeilingSample)
    assert [text for text in memory.said if "no such kernel" in text] == memory.said
    assert len(memory.said) == 1


def test_a_ceiling_that_fails_later_keeps_what_it_measured() -> None:
    FakeArm.failures = {("ceilings", "TakeCeilingTurn", 5): WorkerFailed("oom", "killed", alive=False)}
    memory = measured(CASES, repetitions=3, ceilings=True)
    assert len(memory.of(CeilingSample)) == 5
    assert len([sample for sample in memory.of(Sample) if not sample.warmup]) == 9


def test_a_cell_that_has_no_case_left_takes_no_turn_of_the_ceilings() -> None:
    FakeArm.matches = dict.fromkeys(("naive", "dynamic", "static"), "false")
    assert not measured(CASES, repetitions=2, ceilings=True).of(CeilingSample)


def test_resume_never_uses_the_number_of_a_round_that_a_ceiling_has_used() -> None:
    """Killed after the ceilings' turns of round 1, before any case had its own."""
    torn = interrupted(3 + 3)
    ceilings = [
        make_ceiling(CASES[0].cell, "read_bandwidth", 1e9, number=number, order=20 + number) for number in (0, 1)
    ]
    memory = measured(CASES, msgspec.structs.replace(torn, ceilings=ceilings), repetitions=2, ceilings=True)
    assert {number for number, _ in timed(memory)} == {2}
    assert min(record.order for record in memory.records if not isinstance(record, Check)) == 22


def test_without_ceilings_no_worker_is_started_for_them() -> None:
    measured(CASES, repetitions=1)
    assert FakeArm.log.count(("start", "")) == 4
