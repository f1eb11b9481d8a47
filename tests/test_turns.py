"""Turns in columns are the turns that were put in."""

import msgspec
import numpy as np
import pytest

from bench.record import CeilingSample, Covariates, Sample
from bench.turns import Turns
from tests.handmade import grid, make_case, make_run, steady_roofs

RUN = make_run(
    grid(["naive", "dynamic"], [8]),
    rounds=3,
    roofs=steady_roofs,
    covariates=lambda _, number: Covariates(steal_ns=7, idle_arms_ns=number or None),
)
ON_CUDA = make_run([make_case(device="cuda")], rounds=2, event_share=0.5)


@pytest.mark.parametrize(
    ("kind", "turns"),
    [(Sample, RUN.samples), (CeilingSample, RUN.ceilings), (Sample, [*RUN.samples, *ON_CUDA.samples]), (Sample, [])],
)
def test_a_sequence_of_turns_is_the_same_in_columns(kind, turns):
    columns = Turns.of(kind, turns)
    assert columns == turns
    assert len(columns) == len(turns)
    assert list(columns) == turns
    assert columns[1:3] == turns[1:3]
    assert Turns.of(kind, columns) is columns
    for place in (0, -1) if turns else ():
        assert columns[place] == turns[place]
    with pytest.raises(IndexError):
        columns[len(turns)]


def test_turns_that_come_in_parts_are_joined():
    parts = [Turns.of(Sample, RUN.samples[start : start + 3]) for start in range(0, len(RUN.samples), 3)]
    assert Turns.joined(Sample, parts) == RUN.samples
    assert list(Turns.joined(Sample, [])) == []


def test_a_number_of_more_than_64_bits_is_refused():
    torn = msgspec.structs.replace(RUN.samples[0], prefill_ns=2**63)
    with pytest.raises(OverflowError):
        Turns.of(Sample, [torn])


@pytest.mark.parametrize(("kind", "taken"), [(Sample, [*RUN.samples, *ON_CUDA.samples]), (CeilingSample, RUN.ceilings)])
def test_some_turns_are_those_at_their_places(kind, taken):
    turns, places = Turns.of(kind, taken), np.array([0, 2, len(taken) - 1])
    assert list(turns.at(places)) == [taken[place] for place in places]
    assert turns.at(np.arange(len(taken))) is turns
    assert list(turns.at(places[:0])) == []


def test_of_some_turns_only_their_own_values_are_left():
    turns = Turns.of(Sample, RUN.samples)
    assert turns.at(np.array([0])).coded("case").distinct == [RUN.samples[0].case]
