"""What is asked of a process pair, case by case; nothing is measured."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from bench.ab import pairs
from bench.ab.both import SideFailed
from bench.ab.pairs import PairMeasurer
from bench.ab.record import NAMES, PairFailure, PairTimes, Side
from bench.errors import DataError
from bench.judge.sequential import SCREENING_PAIRS
from bench.measure.worker_process import WorkerFailed
from bench.naming import namer
from bench.protocol import VERSION, Load, Loaded, MakeReference
from bench.store.checked_lines import Appender
from tests.handmade import grid

CASES = grid(["dynamic"], [16, 64, 128])


class FakeForkServer:
    """Forks nothing; `asked` has the references, and the choice of kernels, that were asked for."""

    chosen = ("sum-4",)

    def __init__(self, name, asked):
        self.side, self.asked = Side(name=name, label=name), asked

    def fork(self):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def ask(self, request, timeout_s):
        if isinstance(request, Load) and request.kernels_for:
            self.asked.append(request)
            kernels = {f"of {size}": kernel for size in request.kernels_for for kernel in self.chosen}
            return Loaded(version=VERSION, code="", kernels=kernels)
        if isinstance(request, MakeReference):
            Path(request.path).touch()
            self.asked.append(request.case)
        return None

    def close(self):
        pass


class FakeForkServers:
    """Both sides', which are never renewed."""

    def __init__(self, asked):
        self.own = [FakeForkServer(name, asked) for name in NAMES]

    def __getitem__(self, case):
        return self.own

    def renew(self, *, at_once):
        return False


class FakePair:
    """Measures nothing; `raises` says what comes of a case instead, and `made` has every pair."""

    others = ""
    raises: dict[str, Exception]
    made: list[FakePair]

    def __init__(self, number, base, head, timeout_s, manners):
        self.number, self.measured = number, []
        self.made.append(self)

    def load(self, case, kernels=None, batch_sizes=()):
        self.kernels, self.batch_sizes = kernels, batch_sizes
        return self.others

    def measure(self, key, case, reference):
        assert reference.exists()
        self.measured.append(case)
        if key in self.raises:
            raise self.raises[key]
        return PairTimes(case=key, pair=self.number, turns=[], lockstep=False)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A measurer of fakes; its `asked` and FakePair's `made` show what it did."""
    monkeypatch.setattr(pairs, "Pair", FakePair)
    FakePair.raises, FakePair.made = {}, []
    messages, asked = [], []
    with (
        Appender((tmp_path / "pairs").open("xb"), "digest") as appender,
        PairMeasurer(FakeForkServers(asked), 0, 60.0, appender, messages.append, namer(CASES)) as bench,
    ):
        bench.messages, bench.asked = messages, asked
        yield bench


@pytest.mark.parametrize(
    ("error", "failures"),
    [
        (DataError("other cores"), {("base", "not comparable", "other cores")}),
        (SideFailed({"head": ("oom", "no memory")}), {("head", "oom", "no memory")}),
    ],
)
def test_what_goes_wrong_with_a_case_leaves_the_others_to_new_processes(error, failures, fake):
    FakePair.raises = {CASES[1].key: error}
    records = fake.measure(0, CASES)
    assert [type(record) for record in records] == [PairTimes, PairFailure, PairTimes]
    assert {(record.side, record.status, record.error) for record in records[1:2]} == failures
    assert [[case.n_prompt for case in pair.measured] for pair in FakePair.made] == [[16, 64], [128]]
    assert namer(CASES)(CASES[1]) in fake.messages[0]


def test_prompts_change_when_screening_is_over_and_references_are_made_anew_only_then(fake):
    for number in range(2 * SCREENING_PAIRS):
        fake.measure(number, CASES)
    seeds = [[case.seed for case in pair.measured] for pair in FakePair.made]
    assert seeds[0] == seeds[SCREENING_PAIRS - 1] != seeds[SCREENING_PAIRS] == seeds[-1]
    assert len(fake.asked) == 2 * len(CASES)


def test_both_sides_compute_by_one_choice_of_heads_code(fake):
    cases = [msgspec.structs.replace(CASES[0], strategy="compiled", batch_size=size) for size in (4, 1)]
    for number in range(3):
        fake.measure(number, cases)
    looks = [asked for asked in fake.asked if isinstance(asked, Load)]
    assert [(look.strategy, look.kernels, look.kernels_for) for look in looks] == [("compiled", None, [1, 4])]
    assert [pair.kernels for pair in FakePair.made] == [{"of 1": "sum-4", "of 4": "sum-4"}] * 3


def test_given_kernels_are_those_of_both_sides(fake):
    fake.kernels = {"of 1": "linear"}
    fake.measure(0, [msgspec.structs.replace(CASES[0], strategy="compiled")])
    assert [pair.kernels for pair in FakePair.made] == [{"of 1": "linear"}]
    assert not any(isinstance(asked, Load) for asked in fake.asked)


def test_a_base_with_other_kernels_is_said_once(fake, monkeypatch):
    monkeypatch.setattr(FakePair, "others", "a: not known, head sum-4")
    for number in range(2):
        fake.measure(number, [msgspec.structs.replace(case, strategy="compiled") for case in CASES])
    (message,) = fake.messages
    assert "base does not compute by head's kernels (a: not known, head sum-4)" in message
    assert {tuple(pair.batch_sizes) for pair in FakePair.made} == {(1,)}


def test_a_head_without_a_choice_pins_nothing(fake, monkeypatch):
    monkeypatch.setattr(FakeForkServer, "chosen", {})
    fake.measure(0, [msgspec.structs.replace(CASES[0], strategy="compiled")])
    assert [pair.kernels for pair in FakePair.made] == [None]


def test_sides_of_different_environments_choose_each_for_itself(fake):
    base = fake.fork_servers.own[0]
    base.side = msgspec.structs.replace(base.side, variables={"ONEDNN_MAX_CPU_ISA": "AVX2"})
    fake.measure(0, [msgspec.structs.replace(CASES[0], strategy="compiled")])
    assert [pair.kernels for pair in FakePair.made] == [None]
    assert not any(isinstance(asked, Load) for asked in fake.asked)


def test_a_head_that_cannot_choose_fails(fake, monkeypatch):
    def refused(self, request, timeout_s):
        raise WorkerFailed("oom", "too large", alive=True)

    case = msgspec.structs.replace(CASES[0], strategy="compiled")
    fake._reference(case)
    monkeypatch.setattr(FakeForkServer, "ask", refused)
    (lost,) = fake.measure(0, [case])
    assert (lost.side, lost.status, lost.error) == ("head", "oom", "too large")


def test_a_reference_that_fails_is_bases_failure(fake, monkeypatch):
    def refused(self, request, timeout_s):
        raise WorkerFailed("oom", "too long", alive=True)

    reference = fake._reference(CASES[0])
    assert reference.exists()
    monkeypatch.setattr(FakeForkServer, "ask", refused)
    kept, lost = fake.measure(0, CASES[:2])
    assert isinstance(kept, PairTimes)
    assert (lost.side, lost.status, lost.error) == ("base", "oom", "the reference failed: too long")
