"""One process pair: the order of its turns, equal terms, correctness first, and the one figure that it counts for."""

import itertools
import math
import os
from pathlib import Path

import hypothesis
import msgspec
import pytest
from hypothesis import strategies as st

from bench.ab import both
from bench.ab import pair as pair_module
from bench.ab.both import SideFailed
from bench.ab.figures import figure, undisturbed
from bench.ab.pair import Manner, Pair
from bench.ab.record import NAMES, PairTimes, Turn
from bench.errors import DataError
from bench.measure.worker_process import WorkerFailed
from bench.protocol import CheckCase, Checked, GoOn, Load, Loaded, Paused, TakeTurn, TurnTaken
from bench.record import Covariates
from tests.handmade import make_case

CASE = make_case(n_gen=3)
CORES = 2


class FakeWorker:
    """Answers at once; `log` has who was asked what, in order."""

    def __init__(
        self,
        name,
        log,
        turn_ns=1_000_000,
        match="true",
        steps=(1, 2),
        failure=None,
        first_ns=None,
        step_ns=None,
        compile_s=None,
        lockstep=True,
        kernels=None,
    ):
        self.kernels = kernels or {}
        self.compile_s, self.lockstep = compile_s, lockstep
        self.name, self.log, self.match = name, log, match
        self.steps, self.failure, self.pid, self.step_ns = list(steps), failure, os.getpid(), step_ns
        self.turns_ns = itertools.chain([first_ns or turn_ns], itertools.repeat(turn_ns))

    def death(self):
        return WorkerFailed("failed", "it died", alive=False)

    def ask(self, request, timeout_s):
        self.send(request)
        return self.receive(timeout_s)

    def send(self, request):
        self.request = request
        self.log.append((type(request).__name__, self.name))

    def receive(self, timeout_s):
        if self.failure == type(self.request).__name__:
            raise WorkerFailed("oom", "not enough memory", alive=False)
        match self.request:
            case Load():
                asked = self.request.kernels_for and self.kernels
                return Loaded(version=1, code="", lockstep=self.lockstep, kernels=asked or {})
            case CheckCase():
                self.log.append(("CheckCase answered", self.name))
                return Checked(
                    tokens_match=self.match,
                    logits_error=0.0,
                    positions_checked=3,
                    kv_bytes_after_prefill=0,
                    kv_bytes_after_decode=0,
                    peak_memory_bytes=None,
                    compile_s=self.compile_s,
                )
            case TakeTurn(lockstep=True):
                self.left = 1 + len(self.steps)
                return Paused()
            case GoOn() if self.left > 1:
                self.left -= 1
                return Paused()
            case TakeTurn() | GoOn():
                turn_ns = next(self.turns_ns)
                return TurnTaken(
                    prefill_ns=turn_ns,
                    steps=self.steps,
                    step_ns=[self.step_ns or turn_ns] * len(self.steps),
                    prefill_event_ns=None,
                    step_event_ns=None,
                    covariates=Covariates(steal_ns=0),
                )


@pytest.fixture(autouse=True)
def resting(monkeypatch):
    """The fake workers' process is this one, which is not at rest."""
    monkeypatch.setattr(both.affinity, "at_rest", lambda pid: True)


def measured(number=0, base=None, head=None, case=CASE, manners=None, timeout_s=60.0):
    log: list[tuple[str, str]] = []
    workers = (FakeWorker(name, log, **(own or {})) for name, own in (("base", base), ("head", head)))
    pair = Pair(number, *workers, timeout_s, {} if manners is None else manners)
    pair.load(case)
    log.clear()
    return pair.measure("key", case, Path("reference")), log


@pytest.mark.parametrize(
    ("base", "pinned", "others"),
    [
        ({"a": "sum-4", "b": "linear"}, {"a": "sum-4"}, ""),
        ({"a": "sum-2", "b": "linear"}, {"a": "sum-4"}, "a: sum-2, head sum-4"),
        ({"a, prompt": "linear"}, {"a": "sum-4"}, "a: not known, head sum-4"),
        ({}, {}, "a: not known, head sum-4"),  # of before there was a choice
        ({"a": "sum-2"}, None, ""),  # each side chooses for itself
    ],
)
def test_a_base_that_computes_by_other_kernels_is_seen_as_it_loads(base, pinned, others):
    head = {"a": "sum-4", "b": "linear"}
    workers = [FakeWorker(name, [], kernels=own) for name, own in (("base", base), ("head", head))]
    assert Pair(0, *workers, 60.0, {}).load(CASE, pinned, [1]) == others


def turns(times: PairTimes) -> str:
    return "".join(turn.side[0].upper() for turn in times.turns)


@pytest.mark.parametrize(("number", "order"), [(0, "BBHHHHBB"), (1, "HHBBBBHH")])
def test_both_are_checked_and_warmed_up_then_timed_in_blocks_whose_first_side_alternates(number, order):
    times, log = measured(number)
    assert turns(times) == order * (pair_module.MOST_BLOCKS // 2)
    assert [name for name, _ in log[:4]].count("CheckCase") == 2
    first, second = (("base", "head"), ("head", "base"))[number]
    assert [who for name, who in log if name == "TakeTurn"][:6] == [first, second, second, *[first] * 3]


@pytest.mark.parametrize(("number", "order"), [(0, "BHHB"), (1, "HBBH")])
def test_a_single_block_has_both_sides_in_its_middle(number, order):
    middling = {"turn_ns": 300_000_000, "step_ns": 10**6}
    assert turns(measured(number, middling, middling)[0]) == order


def test_each_sides_shorter_warm_up_says_how_many_turns_there_are():
    assert turns(measured(0, {"turn_ns": 10**6}, {"turn_ns": 10**9, "step_ns": 10**6})[0]) == "BH"
    a_slow_moment = {"turn_ns": 10**6, "first_ns": 10**8}
    assert len(measured(0, a_slow_moment, a_slow_moment)[0].turns) == 4 * pair_module.MOST_BLOCKS


@pytest.fixture
def given(monkeypatch):
    """What `cores.give` was asked for on a machine of four cores."""
    asked: list[list[int]] = []
    monkeypatch.setattr(both.affinity, "common", lambda pid: frozenset(range(4)))
    monkeypatch.setattr(both.affinity, "give", lambda pid, cores: asked.append(sorted(cores)))
    return asked


ONE_THREAD = make_case(n_gen=3, n_threads=1)


def test_both_sides_have_the_same_core_in_a_block_and_another_in_the_next(given):
    for number in (0, 1, 2):
        measured(number, case=ONE_THREAD)
    blocks = given[::2]
    assert blocks == given[1::2]  # base and head
    assert blocks[:5] == [[0], [1], [2], [3], [0, 1, 2, 3]]
    assert blocks[5:10] == blocks[:5]
    assert blocks[10:] == [[1], [2], [3], [0], [0, 1, 2, 3]]


def test_who_has_more_threads_or_a_gpu_or_one_block_is_left_where_it_is(given):
    for case in (make_case(n_gen=3, n_threads=2), make_case(n_gen=3, n_threads=1, device="cuda")):
        measured(case=case)
    slow = {"turn_ns": 10**9, "step_ns": 10**6}
    measured(0, slow, slow, case=ONE_THREAD)
    assert not given


@pytest.mark.parametrize("gone", ["terms", "common", "give"])
def test_a_worker_that_died_in_its_sleep_is_that_sides_failure(gone, given, monkeypatch):
    def vanished(pid, *_):
        raise FileNotFoundError(f"/proc/{pid}/task")

    monkeypatch.setattr(both.affinity, gone, vanished)
    with pytest.raises(SideFailed, match="base failed: it died"):
        measured(case=ONE_THREAD)


def test_cores_that_the_system_does_not_give_are_told(given, monkeypatch):
    def refused(pid, cores):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(both.affinity, "give", refused)
    with pytest.raises(DataError, match="base's worker cannot be given cores: Operation not permitted"):
        measured(case=ONE_THREAD)


@pytest.mark.parametrize(("cores", "at_once"), [(4, True), (3, False)])
@pytest.mark.parametrize("number", [0, 1])
def test_both_check_at_once_only_where_each_of_their_threads_has_a_core(cores, at_once, number, monkeypatch):
    monkeypatch.setattr(both, "usable_cores", lambda: cores)
    _, log = measured(number)
    first, second = (("base", "head"), ("head", "base"))[number]
    sent, got = ("CheckCase", "CheckCase answered")
    alternately = [(sent, first), (got, first), (sent, second), (got, second)]
    found = [entry for entry in log if entry[0].startswith("CheckCase")]
    assert found == ([(sent, "base"), (sent, "head"), (got, first), (got, second)] if at_once else alternately)


@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize("number", [0, 1])
def test_where_cores_are_too_few_a_side_begins_when_the_other_rests(number, lockstep, monkeypatch):
    """Whoever has just answered computes on until it has been looked at three times, as threads that spin do."""
    monkeypatch.setattr(both, "usable_cores", lambda: 3)
    log: list[tuple[str, str]] = []
    sides = {name: FakeWorker(name, log, turn_ns=10**8 if lockstep else 10**6) for name in NAMES}
    looks = {}
    for pid, worker in enumerate(sides.values()):
        worker.pid, looks[pid] = pid, 0
    receive = FakeWorker.receive

    def at_rest(pid):
        looks[pid] -= 1
        return looks[pid] < 0

    def received(self, timeout_s):
        if not isinstance(self.request, Load):
            other = 1 - self.pid
            assert looks[other] < 0, "asked while the other side computes"
            looks[self.pid] = 2
        return receive(self, timeout_s)

    monkeypatch.setattr(FakeWorker, "receive", received)
    monkeypatch.setattr(both.affinity, "at_rest", at_rest)
    monkeypatch.setattr(both.affinity, "waited_ns", lambda pid: 0)
    monkeypatch.setattr(both.affinity, "terms", lambda pid: "any core")
    monkeypatch.setattr(both.affinity, "common", lambda pid: frozenset())
    pair = Pair(number, *sides.values(), 60.0, {})
    pair.load(CASE)
    assert pair.measure("key", CASE, Path("reference")).lockstep == lockstep


@pytest.mark.parametrize("spinning", ["base", "head"])
def test_a_side_that_computes_while_it_waits_is_in_the_others_way(spinning, monkeypatch):
    monkeypatch.setattr(both.affinity, "MOST_SPIN_S", 0.01)
    monkeypatch.setattr(both.affinity, "terms", lambda pid: "any core")
    monkeypatch.setattr(both.affinity, "common", lambda pid: frozenset())
    monkeypatch.setattr(both.affinity, "waited_ns", lambda pid: 0)
    monkeypatch.setattr(both.affinity, "at_rest", lambda pid: pid != 1)
    log: list[tuple[str, str]] = []
    workers = {name: FakeWorker(name, log) for name in NAMES}
    for name, worker in workers.items():
        worker.pid = int(name == spinning)
    pair = Pair(0, *workers.values(), 60.0, {})
    monkeypatch.setattr(both, "usable_cores", lambda: 4)
    pair.measure("key", CASE, Path("reference"))  # there is a core for each thread
    monkeypatch.setattr(both, "usable_cores", lambda: 3)
    with pytest.raises(DataError, match=f"{spinning}'s worker computes while it waits"):
        pair.measure("key", CASE, Path("reference"))


def test_a_long_turn_is_taken_once():
    slow = {"turn_ns": 10**9, "step_ns": 10**6}
    assert turns(measured(0, slow, slow)[0]) == "BH"
    assert turns(measured(1, slow, slow)[0]) == "HB"


LONG_STEPS = {"turn_ns": 10**8}


@pytest.mark.parametrize(("number", "order"), [(0, "BHBHBHBHHBHBHBHB"), (1, "HBHBHBHBBHBHBHBH")])
def test_long_steps_are_taken_in_lockstep_and_who_is_first_alternates(number, order):
    times, log = measured(number, LONG_STEPS, LONG_STEPS)
    assert times.lockstep
    assert turns(times) == "BH" * pair_module.LEAST_LOCKSTEP_BLOCKS
    asked = [(name, who[0].upper()) for name, who in log if name in {"TakeTurn", "GoOn"}][4:]
    assert "".join(who for _, who in asked) == order  # the prefill, two steps, and the end of the turn; twice
    assert [name for name, _ in asked] == [*["TakeTurn"] * 2, *["GoOn"] * 6] * 2


@pytest.mark.parametrize(("compile_s", "warm_ups"), [(None, 0), (0.0, 4)])
def test_from_the_second_pair_on_a_long_check_is_all_the_warm_up_unless_it_compiled(compile_s, warm_ups):
    sides, manners = LONG_STEPS | {"compile_s": compile_s}, {}
    times, log = measured(0, sides, sides, manners=manners)
    assert times.lockstep
    assert [name for name, _ in log].count("TakeTurn") == 4 + len(times.turns)
    times, log = measured(1, sides, sides, manners=manners)
    assert times.lockstep
    assert [name for name, _ in log].count("TakeTurn") == warm_ups + len(times.turns)


def test_a_long_turn_warms_up_once():
    slow = {"turn_ns": 10**9, "step_ns": 10**6}
    times, log = measured(0, slow, slow)
    assert [name for name, _ in log].count("TakeTurn") == 2 + len(times.turns)


def test_whole_turns_always_have_a_warm_up():
    manners = {}
    for number in (0, 1):
        times, log = measured(number, manners=manners)
        assert [name for name, _ in log].count("TakeTurn") == 4 + len(times.turns)


def test_the_prefill_alone_does_not_make_steps_long():
    """As with a long prompt and few steps."""
    receive = FakeWorker.receive

    def received(self, timeout_s):
        reply = receive(self, timeout_s)
        return msgspec.structs.replace(reply, prefill_ns=10**9) if isinstance(reply, TurnTaken) else reply

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeWorker, "receive", received)
        assert not measured(0)[0].lockstep


def test_what_the_first_pair_found_holds_for_all_pairs_of_a_case():
    manners = {}
    measured(0, LONG_STEPS, LONG_STEPS, manners=manners)
    assert manners == {"key": Manner(lockstep=True, warm_up=False, turn_s=0.3)}
    quick = LONG_STEPS | {"turn_ns": 10**6}
    assert measured(1, quick, quick, manners=manners)[0].lockstep
    manners["key"] = Manner(lockstep=False, warm_up=True, turn_s=0.3)
    assert not measured(2, LONG_STEPS, LONG_STEPS, manners=manners)[0].lockstep


def test_operations_are_not_counted(monkeypatch):
    asked = []
    send = FakeWorker.send
    monkeypatch.setattr(FakeWorker, "send", lambda self, request: (asked.append(request), send(self, request)))
    measured(0, LONG_STEPS, LONG_STEPS)
    assert [request.count for request in asked if isinstance(request, CheckCase)] == [False] * 2


@pytest.mark.parametrize("number", [0, 1])
def test_where_cores_are_too_few_both_sides_failures_are_told(number, monkeypatch):
    """Though nothing can be seen of a process that is gone."""
    monkeypatch.setattr(both, "usable_cores", lambda: 3)
    gone = set()

    def at_rest(pid):
        if pid in gone:
            raise FileNotFoundError(f"/proc/{pid}/task")
        return True

    receive = FakeWorker.receive

    def received(self, timeout_s):
        try:
            return receive(self, timeout_s)
        except WorkerFailed:
            gone.add(self.pid)
            raise

    monkeypatch.setattr(FakeWorker, "receive", received)
    monkeypatch.setattr(both.affinity, "at_rest", at_rest)
    with pytest.raises(SideFailed) as told:
        measured(number, {"failure": "CheckCase"}, {"failure": "CheckCase"})
    assert told.value.failures == dict.fromkeys(NAMES, ("oom", "not enough memory"))


def test_what_was_waited_for_a_core_before_the_first_token_is_told_apart(monkeypatch):
    waited = itertools.count(step=5)  # each request costs 5, as two readings of it tell
    monkeypatch.setattr(both.affinity, "waited_ns", lambda pid: next(waited))
    times, _ = measured(0, LONG_STEPS, LONG_STEPS)
    assert {(turn.prefill_waited_ns, turn.waited_ns) for turn in times.turns} == {(5, 20)}


def test_a_turn_in_lockstep_has_one_time_limit(monkeypatch):
    """Each token takes a second by the driver's clock, and every reading of it some more."""
    now, given_s = itertools.count(), []
    receive = FakeWorker.receive

    def received(self, timeout_s):
        if isinstance(self.request, TakeTurn | GoOn):
            given_s.append((self.name, timeout_s))
        return receive(self, timeout_s)

    monkeypatch.setattr(FakeWorker, "receive", received)
    monkeypatch.setattr(pair_module.time, "monotonic", lambda: float(next(now)))
    measured(
        0, LONG_STEPS, LONG_STEPS, manners={"key": Manner(lockstep=True, warm_up=False, turn_s=0.3)}, timeout_s=2.5
    )
    assert [seconds for name, seconds in given_s if name == "head"][:4] == [2.5, 1.5, 0.5, 0.0]


def test_who_has_short_steps_or_a_gpu_or_is_too_old_takes_whole_turns():
    for base, head, case in [
        (LONG_STEPS | {"turn_ns": 10**6}, LONG_STEPS | {"turn_ns": 10**6}, CASE),
        (LONG_STEPS, LONG_STEPS, make_case(n_gen=3, device="cuda")),
        (LONG_STEPS | {"lockstep": False}, LONG_STEPS, CASE),
    ]:
        times, log = measured(0, base, head, case)
        assert not times.lockstep
        assert not [name for name, _ in log if name == "GoOn"]


def test_in_lockstep_too_a_side_that_fails_is_named_and_other_steps_are_not_comparable():
    with pytest.raises(SideFailed, match="not enough memory") as told:
        measured(0, LONG_STEPS, LONG_STEPS | {"failure": "GoOn"})
    assert set(told.value.failures) == {"head"}
    for other in ((1,), (1, 2, 3)):
        with pytest.raises(DataError, match="different decode steps"):
            measured(0, LONG_STEPS, LONG_STEPS | {"steps": other})


def test_in_lockstep_one_thread_has_the_same_core_on_both_sides(given):
    measured(0, LONG_STEPS, LONG_STEPS, ONE_THREAD)
    assert given == [[0], [0], [1], [1], [0, 1, 2, 3], [0, 1, 2, 3]]


@pytest.mark.parametrize("side", ["base", "head"])
def test_other_tokens_are_never_timed(side):
    with pytest.raises(SideFailed, match="other tokens") as told:
        measured(**{side: {"match": "false"}})
    assert set(told.value.failures) == {side}


def test_both_sides_failures_are_told():
    with pytest.raises(SideFailed) as told:
        measured(base={"failure": "CheckCase"}, head={"failure": "CheckCase"})
    assert set(told.value.failures) == {"base", "head"}


@pytest.mark.parametrize("request_name", ["CheckCase", "TakeTurn"])
def test_a_side_that_fails_is_named(request_name):
    with pytest.raises(SideFailed, match="not enough memory") as told:
        measured(head={"failure": request_name})
    assert told.value.failures == {"head": ("oom", "not enough memory")}


def test_sides_that_time_other_steps_are_not_comparable():
    with pytest.raises(DataError, match="different decode steps"):
        measured(head={"steps": (1,)})


@pytest.mark.parametrize("equal", range(pair_module.MOST_BLOCKS + 1))
def test_a_side_on_other_cores_is_not_comparable_whenever_that_begins(equal, monkeypatch):
    terms = "cores 0,1 at nice 0"
    answers = iter([terms, terms, *[terms, terms] * equal, terms, "cores 0 at nice 0"])
    monkeypatch.setattr(both.affinity, "terms", lambda pid: next(answers))
    with pytest.raises(DataError, match=r"base's worker may use cores 0,1 at nice 0, head's cores 0 at nice 0"):
        measured()


def block(number, base_ns, head_ns, steal_ns=0):
    times = [("base", base_ns), ("head", head_ns), ("head", head_ns), ("base", base_ns)]
    return [
        Turn(side=side, block=number, prefill_ns=ns, step_ns=[ns, ns], wall_ns=3 * ns, waited_ns=0, steal_ns=steal_ns)
        for side, ns in times
    ]


@hypothesis.given(st.integers(10**5, 10**9), st.integers(10**5, 10**9))
def test_the_figure_is_the_log_of_the_ratio(base_ns, head_ns):
    times = PairTimes(case="key", pair=0, turns=block(0, base_ns, head_ns), lockstep=False)
    for phase in ("prefill", "decode"):
        assert figure(times, phase, 1, CORES) == pytest.approx(math.log(head_ns / base_ns), abs=1e-9)


def test_stalls_and_stolen_turns_do_not_move_the_figure():
    quiet = [turn for number in range(3) for turn in block(number, 10**6, 11 * 10**5)]
    stalled = block(3, 10**6, 10**9)
    stolen = block(4, 10**5, 5 * 10**6, steal_ns=10**9)
    found = figure(PairTimes(case="key", pair=0, turns=[*quiet, *stalled, *stolen], lockstep=False), "decode", 1, CORES)
    assert found == pytest.approx(math.log(1.1))
    assert figure(PairTimes(case="key", pair=0, turns=stolen, lockstep=False), "decode", 1, CORES) is None
    throttled = [msgspec.structs.replace(turn, steal_ns=None, throttled_ns=10**9) for turn in stolen]
    assert figure(PairTimes(case="key", pair=0, turns=throttled, lockstep=False), "decode", 1, CORES) is None


def test_every_step_is_the_fastest_of_its_place():
    def turn(side, *step_ns):
        return Turn(
            side=side, block=0, prefill_ns=1, step_ns=list(step_ns), wall_ns=1 + sum(step_ns), waited_ns=0, steal_ns=0
        )

    taken = [turn("base", 100, 900), turn("base", 900, 100), turn("head", 120, 900), turn("head", 900, 120)]
    found = figure(PairTimes(case="key", pair=0, turns=taken, lockstep=False), "decode", 1, CORES)
    assert found == pytest.approx(math.log(1.2))


@hypothesis.given(st.lists(st.integers(0, 10**6), min_size=15, max_size=15), st.floats(1.0, 2.0))
def test_what_every_step_costs_more_shows_whatever_is_added(added, slowdown):
    """Noise that only adds: to all steps of every turn but one, a different one in each of a side's first three."""
    taken = []
    for at in range(10):
        side = NAMES[at % 2]
        step_ns = [round(10**6 * (slowdown if side == "head" else 1))] * 3
        noisy = [time + added[(at + step) % 15] for step, time in enumerate(step_ns)]
        step_ns = [*noisy[: at // 2], *step_ns[at // 2 : at // 2 + 1], *noisy[at // 2 + 1 :]]
        taken.append(
            Turn(side=side, block=at // 4, prefill_ns=1, step_ns=step_ns, wall_ns=1, waited_ns=0, steal_ns=None)
        )
    found = figure(PairTimes(case="key", pair=0, turns=taken, lockstep=False), "decode", 1, CORES)
    assert found == pytest.approx(math.log(slowdown), abs=1e-5)


def test_a_cost_whose_place_differs_from_turn_to_turn_is_not_seen():
    """As docs/judging-a-change.md warns, under "Not seen"."""
    quiet = block(0, 10**6, 10**6)
    quiet[1] = msgspec.structs.replace(quiet[1], step_ns=[10**6, 2 * 10**6])
    quiet[2] = msgspec.structs.replace(quiet[2], step_ns=[2 * 10**6, 10**6])
    assert figure(PairTimes(case="key", pair=0, turns=quiet, lockstep=False), "decode", 1, CORES) == 0


@hypothesis.given(st.lists(st.floats(1.0, 10.0), min_size=4, max_size=4), st.floats(0.5, 2.0))
def test_in_lockstep_a_slow_machine_is_in_both(slow, slowdown):
    taken = [
        Turn(side=side, block=at, prefill_ns=ns, step_ns=[ns, 3 * ns], wall_ns=1, waited_ns=0, steal_ns=None)
        for at, by in enumerate(slow)
        for side, ns in (("base", round(10**8 * by)), ("head", round(10**8 * by * slowdown)))
    ]
    times = PairTimes(case="key", pair=0, turns=taken, lockstep=True)
    for phase in ("prefill", "decode"):
        assert figure(times, phase, 1, CORES) == pytest.approx(math.log(slowdown), abs=1e-6)


def test_of_prefills_in_lockstep_all_count_and_of_others_the_fastest():
    taken = block(0, 10**6, 10**6)
    taken[1] = msgspec.structs.replace(taken[1], prefill_ns=2 * 10**6)
    for lockstep, log_ratio in ((True, math.log(2) / 2), (False, 0.0)):
        times = PairTimes(case="key", pair=0, turns=taken, lockstep=lockstep)
        assert figure(times, "prefill", 1, CORES) == pytest.approx(log_ratio)


def test_a_stolen_turn_takes_its_opposite_along():
    quiet, stolen = block(0, 10**6, 10**6), block(1, 10**5, 10**5)
    stolen[0] = msgspec.structs.replace(stolen[0], steal_ns=10**9)
    left = undisturbed(PairTimes(case="key", pair=0, turns=[*quiet, *stolen], lockstep=False), 1, CORES)
    assert {name: len(own) for name, own in left.items()} == {"base": 3, "head": 3}


def test_more_threads_than_cores_lose_no_more_time_than_the_cores_have():
    taken = [turn for number in range(2) for turn in block(number, 10**9, 10**9)]
    taken[0] = msgspec.structs.replace(taken[0], throttled_ns=5 * 10**8)  # 8 % of two cores' time
    times = PairTimes(case="key", pair=0, turns=taken, lockstep=False)
    assert len(undisturbed(times, n_threads=8, cores=2)["base"]) == len(taken) // 2 - 1
    assert len(undisturbed(times, n_threads=8, cores=8)["base"]) == len(taken) // 2
