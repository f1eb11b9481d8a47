"""--budget: what goes first, what never goes, and what a resumed run keeps. Times are made up; no clock is read."""

import json
from pathlib import Path

import pytest

from bench.case import TOKENS_PER_TURN, naive_steps
from bench.measure import budget
from bench.measure.budget import Budget, Reduction, fit, reduced, seconds_of, turn_seconds
from bench.measure.plan import Limits
from bench.measure.resume import Past
from bench.naming import namer
from bench.record import CellPlan
from bench.store.run_folder import read_run
from tests import stub_run
from tests.handmade import grid, make_plan

LIMITS = Limits(repetitions=12, budget_min=1.0)
CELLS = [[make_plan(case) for case in grid(["naive", "dynamic"], [length], n_gen=16)] for length in (8, 16, 32)]
NAME = namer(item.case for cell in CELLS for item in cell)


def of(seconds: float, *, may_end: bool = False) -> Reduction:
    return fit(CELLS, LIMITS, seconds, may_end=may_end)


WHOLE_S = seconds_of(CELLS, LIMITS, Reduction(12))
"""Of everything."""


def test_what_fits_is_left_as_it_is() -> None:
    assert of(WHOLE_S) == Reduction(12)


def test_first_fewer_positions_then_fewer_rounds_then_no_long_prompts() -> None:
    steps = [of(share * WHOLE_S) for share in (0.99, 0.8, 0.65, 0.5, 0.3)]
    assert steps[0].tokens_per_turn < TOKENS_PER_TURN
    assert (steps[0].repetitions, steps[0].most_tokens) == (12, None)
    kept = [step for step in steps if step.most_tokens is None]
    assert [step.repetitions for step in kept] == sorted((step.repetitions for step in kept), reverse=True)
    dropped = steps[len(kept) :]
    assert dropped
    assert dropped[-1].leaves_out(CELLS[2])
    assert not dropped[-1].leaves_out(CELLS[0])


def test_what_is_chosen_fits_where_anything_does() -> None:
    for share in (0.3, 0.5, 0.7, 0.9):
        assert seconds_of(CELLS, LIMITS, of(share * WHOLE_S)) <= share * WHOLE_S


def test_never_under_six_rounds_and_never_nothing_at_all() -> None:
    least = of(0.0)
    assert least.repetitions == 6
    assert not least.leaves_out(CELLS[0])
    assert fit(CELLS, Limits(repetitions=3), 0.0).repetitions == 3  # what was asked for, not more
    assert of(0.0, may_end=True).leaves_out(CELLS[0])  # the rest of a run that measured something


def test_a_slow_machine_gets_less() -> None:
    slow = fit(CELLS, LIMITS, WHOLE_S, {"naive": 3.0, "dynamic": 3.0})
    assert slow != Reduction(12)


def test_a_reduction_is_said_in_one_line() -> None:
    assert reduced(CELLS[0], LIMITS, Reduction(12), NAME) == ""
    assert reduced(CELLS[0], LIMITS, Reduction(6, most_tokens=4), NAME) == "prompt 8 is left out"
    words = reduced(CELLS[0], LIMITS, Reduction(6, 32), NAME)
    n_steps = len(naive_steps(CELLS[0][0].case, 32))
    assert words == f"prompt 8: naive is timed at {n_steps} of 15 positions, not 15, 6 rounds, not 12"


class Decided:
    """A budget over CELLS, with what it stored and said."""

    def __init__(self, past: Past | None = None, limits: Limits = LIMITS) -> None:
        self.stored: list[CellPlan] = []
        self.said: list[str] = []
        self.past = past or Past(None)
        self.budget = Budget(limits, self.past, CELLS, self.stored.append, self.said.append, NAME)


@pytest.fixture(autouse=True)
def _standing_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget.time, "monotonic", lambda: 100.0)


def test_the_first_cell_shows_the_speed_and_the_others_pay_for_it() -> None:
    decided = Decided()
    assert decided.budget.plan(CELLS[0]).repetitions == 12
    assert decided.said == []
    for item in CELLS[0]:
        decided.budget.learn(item, 5000 * turn_seconds(item), None)
    assert decided.budget.plan_again(CELLS[0]).repetitions == 6
    decided.budget.done(CELLS[0])
    assert "left out" in str(decided.budget.plan(CELLS[1]).left_out)
    assert decided.said == ["--budget 1: prompt 8: 6 rounds, not 12", "--budget 1: prompt 16 is left out"]
    assert [(plan.repetitions, plan.left_out) for plan in decided.stored[:2]] == [(12, None), (6, None)]


def test_without_a_budget_nothing_is_decided_or_stored() -> None:
    decided = Decided(limits=Limits(repetitions=12))
    assert decided.budget.plan(CELLS[2]).repetitions == 12
    assert decided.stored == []


def test_a_resumed_run_keeps_what_was_decided_and_what_was_spent() -> None:
    past = Past(None)
    plan = CellPlan(cell=CELLS[2][0].case.cell.key, repetitions=6, tokens_per_turn=8, left_out="no time", spent_s=50.0)
    past.cell_plans[plan.cell] = plan
    decided = Decided(past)
    assert decided.budget.plan(CELLS[2]) == plan
    assert decided.stored == []
    assert past.missing_rounds(CELLS[2], 0, 12) == 0
    assert past.missing_rounds(CELLS[1], 0, 12) == 12
    assert past.spent_s == 50.0


def test_a_run_with_a_budget_stores_and_resumes_its_reduced_plan(tmp_path: Path) -> None:
    """The stub's turns take no time by its own clock, so that only START_S counts, which is more than the budget."""
    grid_flags = ["-m", "random:tiny", "-t", "1", "-p", "8,16,32", "-n", "8", "--strategies", "naive,dynamic"]
    flags = ["run", *grid_flags, "-r", "8", "--no-ceilings", "--budget", "0.1", "-o", "json", "--out", str(tmp_path)]
    code, text, errors = stub_run.finish(flags, tmp_path)
    assert code == 0, errors
    rows = json.loads(text)
    assert {row["n_prompt"] for row in rows if row["status"] == "ok"} == {8}
    left_out = [row for row in rows if row["status"] == "not measured"]
    assert {row["n_prompt"] for row in left_out} == {16, 32}
    assert {row["error"] for row in left_out} == {"left out to end within --budget 0.1 (minutes)"}
    for label in ("prompt 16", "prompt 32"):
        assert f"--budget 0.1: {label} is left out" in errors
    (folder,) = tmp_path.glob("*Z-*")
    n_samples = len(read_run(folder).samples)
    code, _, errors = stub_run.finish(["run", "--resume", str(folder)], tmp_path)
    assert code == 0, errors
    assert len(read_run(folder).samples) == n_samples
