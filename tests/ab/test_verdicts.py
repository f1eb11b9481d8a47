"""An A/B from pair to pair: what is measured next, when it ends, and what it says. Synthetic pairs, a fake clock."""

import math

import msgspec
import pytest

from bench.ab import verdicts
from bench.ab.conduct import conduct as conduct_pairs
from bench.ab.record import PairFailure
from bench.judge.sequential import PAIRS_A_PROMPT, SCREENING_PAIRS
from bench.judge.verdict import exit_code
from tests.handmade import grid
from tests.synthetic import Machine

STILL = Machine(process_sd=0.001, turn_noise=0.001, burst=0.0, odd_pair=0.0, drift=0.0)
SLOWER = Machine(0.1, process_sd=0.001, turn_noise=0.001, burst=0.0, odd_pair=0.0, drift=0.0)
CASES = grid(["naive", "dynamic"], [128])
KEYS = [case.key for case in CASES]
CORES = 2


class Clock:
    """Goes on when a pair is measured."""

    now = 0.0

    def __call__(self):
        return self.now


def conduct(measure, budget_s=math.inf, seconds_per_case=1.0, say=lambda text: None):
    clock, asked = Clock(), []

    def timed(number, cases):
        asked.append([case.key for case in cases])
        clock.now += seconds_per_case * len(cases)
        return measure(number, cases)

    return conduct_pairs(CASES, timed, threshold=0.03, cores=CORES, budget_s=budget_s, clock=clock, say=say), asked


def only(key, slow, still):
    """Pairs of `slow` for one case, and of `still` for the others."""
    return lambda number, cases: [
        record for case in cases for record in (slow if case.key == key else still)(number, [case])
    ]


def test_what_lies_still_ends_with_screening():
    records, asked = conduct(STILL.pairs(0))
    assert len(asked) == SCREENING_PAIRS
    assert {found.kind for found in verdicts.verdicts(records, CASES, 0.03, CORES)} == {"same"}


def test_only_what_is_flagged_is_measured_on():
    records, asked = conduct(only(KEYS[1], SLOWER.pairs(1), STILL.pairs(2)))
    assert asked[:SCREENING_PAIRS] == [KEYS] * SCREENING_PAIRS
    assert asked[SCREENING_PAIRS:] == [[KEYS[1]]] * (len(asked) - SCREENING_PAIRS)
    found = {(verdict.case.key, verdict.phase): verdict for verdict in verdicts.verdicts(records, CASES, 0.03, CORES)}
    assert found[KEYS[1], "decode"].kind == "regression"
    assert found[KEYS[1], "decode"].effect == pytest.approx(0.1, abs=0.01)
    assert found[KEYS[1], "prefill"].kind == "same"
    assert exit_code(found.values()) == 1


def test_the_figures_of_a_row_are_of_the_same_pairs():
    """In screening the machine was twice as slow: a change is confirmed on later pairs, and so are both times."""
    taken = SLOWER.pairs(1)

    def measure(number, cases):
        slow = 2 if number < SCREENING_PAIRS else 1
        return [
            msgspec.structs.replace(pair, turns=[twice(turn, slow) for turn in pair.turns])
            for pair in taken(number, cases)
        ]

    def twice(turn, slow):
        return msgspec.structs.replace(
            turn, prefill_ns=slow * turn.prefill_ns, step_ns=[slow * ns for ns in turn.step_ns]
        )

    records, _ = conduct(measure)
    for verdict in verdicts.verdicts(records, CASES, 0.03, CORES):
        assert verdict.kind == "regression" if verdict.phase == "decode" else verdict.kind == "same"
        assert verdict.head / verdict.base == pytest.approx(1 + verdict.effect, abs=0.01)
        expected_ms = {"decode": 0.7, "prefill": 7.2}[verdict.phase]
        assert verdict.base == pytest.approx(expected_ms, rel=0.1)


def test_an_interrupted_one_says_what_it_knew_when_it_began_its_last_pair():
    records, _ = conduct(only(KEYS[1], SLOWER.pairs(1), STILL.pairs(2)))
    at_the_end = [verdict.kind for verdict in verdicts.verdicts(records, CASES, 0.03, CORES)]
    for stored in range(len(records) + 1):
        found = verdicts.verdicts(records[:stored], CASES, 0.03, CORES, finished=False)
        assert all(verdict.kind in {"inconclusive", last} for verdict, last in zip(found, at_the_end, strict=True))
        assert all(", unfinished" in verdict.detail for verdict in found if verdict.kind == "inconclusive")


def test_the_budget_ends_it_before_a_pair_that_would_not_fit():
    messages: list[str] = []
    records, asked = conduct(SLOWER.pairs(0), budget_s=7.0, say=messages.append)
    assert len(asked) == 3
    assert messages[0] == "process pair 1, screening: 4 of 4 times open, in 2 cases; 0.1 min left"
    found = verdicts.verdicts(records, CASES, 0.03, CORES)
    assert {verdict.kind for verdict in found} == {"inconclusive"}
    assert found[0].detail == "undecided after 3 process pairs (a change takes 8 at least), --budget is spent"
    assert found[0].effect is not None
    assert found[0].low is None, "an interval of three pairs says nothing"
    assert exit_code(found) == 4


def test_a_pair_is_expected_to_take_as_long_as_the_slowest_since_the_prompts_were_new():
    clock, numbers = Clock(), []

    def measure(number, cases):
        numbers.append(number)
        clock.now += 3.0 if number % PAIRS_A_PROMPT == 0 else 1.0
        return SLOWER.pairs(0)(number, cases)

    conduct_pairs(CASES, measure, threshold=0.03, cores=CORES, budget_s=8.0, clock=clock, say=print)
    assert numbers == [0, 1, 2, 3]  # at the pace of the last alone, the next would end after nine


def test_what_comes_before_a_pair_is_no_part_of_the_pace():
    clock, numbers = Clock(), []

    def get_ready(number):
        numbers.append(number)
        clock.now += 3.0 * (number == 0)

    def measure(number, cases):
        clock.now += 1.0
        return SLOWER.pairs(0)(number, cases)

    conduct_pairs(
        CASES, measure, threshold=0.03, cores=CORES, budget_s=6.5, clock=clock, say=print, get_ready=get_ready
    )
    assert numbers == [0, 1, 2]  # with the first pair's three seconds in the pace it would end after one


def test_no_pair_is_begun_after_a_preparation_that_used_the_budget_up():
    clock, measured = Clock(), []

    def get_ready(number):
        clock.now += 10.0 * (number == SCREENING_PAIRS)

    def measure(number, cases):
        clock.now += 1.0
        measured.append(number)
        return SLOWER.pairs(0)(number, cases)

    conduct_pairs(
        CASES, measure, threshold=0.03, cores=CORES, budget_s=12.0, clock=clock, say=print, get_ready=get_ready
    )
    assert measured == list(range(SCREENING_PAIRS))


def test_a_case_that_fails_is_left_and_the_others_go_on():
    def measure(number, cases):
        found = []
        for case in cases:
            if case.key == KEYS[0] and number == 1:
                found.append(PairFailure(case=case.key, pair=1, side="head", status="failed", error="other tokens"))
            else:
                found += STILL.pairs(number)(number, [case])
        return found

    records, asked = conduct(measure)
    assert asked == [KEYS, KEYS, [KEYS[1]], [KEYS[1]]]
    found = verdicts.verdicts(records, CASES, 0.03, CORES)
    assert [verdict.kind for verdict in found] == ["failed", "failed", "same", "same"]
    assert exit_code(found) == 5


@pytest.mark.parametrize(
    ("failures", "kind", "code"),
    [
        ({"base": "oom"}, "missing", 3),
        ({"head": "unsupported"}, "missing", 3),
        ({"base": "failed", "head": "unsupported"}, "missing", 3),
        ({"head": "oom"}, "failed", 5),
        ({"base": "unsupported", "head": "failed"}, "failed", 5),
        ({"base": "unsupported", "head": "unsupported"}, "not-comparable", 0),
    ],
)
def test_what_fails_on_either_side(failures, kind, code):
    def failing(keys):
        return [
            PairFailure(case=key, pair=0, side=side, status=status, error="no")
            for key in keys
            for side, status in failures.items()
        ]

    others = [record for number in range(SCREENING_PAIRS) for record in STILL.pairs(2)(number, CASES[1:])]
    found = verdicts.verdicts(failing(KEYS[:1]) + others, CASES, 0.03, CORES)
    assert [verdict.kind for verdict in found] == [kind, kind, "same", "same"]
    assert exit_code(found) == code
    everywhere = exit_code(verdicts.verdicts(failing(KEYS), CASES, 0.03, CORES))
    assert everywhere == (5 if kind in {"failed", "not-comparable"} else 3)


def test_what_was_decided_before_base_failed_stands():
    records, _ = conduct(only(KEYS[1], SLOWER.pairs(1), STILL.pairs(2)))
    before = verdicts.verdicts(records, CASES, 0.03, CORES)
    lost = PairFailure(case=KEYS[1], pair=max(record.pair for record in records), side="base", status="oom", error="no")
    assert verdicts.verdicts([*records, lost], CASES, 0.03, CORES) == before
    assert exit_code(before) == 1


def test_a_slow_down_that_is_all_waiting_for_a_core_is_none_of_the_code():
    def measure(number, cases):
        return [
            msgspec.structs.replace(
                record,
                turns=[
                    msgspec.structs.replace(turn, waited_ns=3_000_000 if turn.side == "head" else 0)
                    for turn in record.turns
                ],
            )
            for record in SLOWER.pairs(number)(number, cases)
        ]

    records, _ = conduct(measure)
    decode = [found for found in verdicts.verdicts(records, CASES, 0.03, CORES) if found.phase == "decode"]
    assert {found.kind for found in decode} == {"inconclusive"}
    assert "waited for a core" in decode[0].detail


@pytest.mark.parametrize(("prefill_waited_ns", "kind"), [(0, "regression"), (8_000_000, "inconclusive")])
def test_in_lockstep_a_phase_is_excused_by_its_own_waiting_alone(prefill_waited_ns, kind):
    """Head's prefill is 4 ms slower than the 40 ms of base; its decode waits for a core, whatever its prefill does."""

    def slowed(turn):
        slower = turn.side == "head"
        return msgspec.structs.replace(
            turn,
            prefill_ns=round(turn.prefill_ns * (1.1 if slower else 1)),
            waited_ns=(prefill_waited_ns + 10**9) * slower,
            prefill_waited_ns=prefill_waited_ns * slower,
        )

    machine = Machine(process_sd=0.001, turn_noise=0.001, burst=0.0, odd_pair=0.0, drift=0.0, lockstep=True)

    def measure(number, cases):
        records = machine.pairs(number)(number, cases)
        return [msgspec.structs.replace(record, turns=list(map(slowed, record.turns))) for record in records]

    records, _ = conduct(measure)
    found = {verdict.kind for verdict in verdicts.verdicts(records, CASES, 0.03, CORES) if verdict.phase == "prefill"}
    assert found == {kind}


def test_a_regression_of_the_fastest_steps_is_no_waiting_if_nobody_waited():
    """Though something else makes a step of every turn of base late, so that as a whole its turns are slower."""

    def late(turn, at):
        steps_ns = [time + 10**7 * (step == at) for step, time in enumerate(turn.step_ns)]
        return msgspec.structs.replace(turn, step_ns=steps_ns, wall_ns=turn.prefill_ns + sum(steps_ns))

    def measure(number, cases):
        return [
            msgspec.structs.replace(
                record,
                turns=[late(turn, at) if turn.side == "base" else turn for at, turn in enumerate(record.turns)],
            )
            for record in SLOWER.pairs(number)(number, cases)
        ]

    records, _ = conduct(measure)
    decode = [found for found in verdicts.verdicts(records, CASES, 0.03, CORES) if found.phase == "decode"]
    assert {found.kind for found in decode} == {"regression"}


def test_without_any_pair_nothing_is_said():
    assert {verdict.kind for verdict in verdicts.verdicts([], CASES, 0.03, CORES)} == {"inconclusive"}
