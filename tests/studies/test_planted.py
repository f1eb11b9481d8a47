"""The counters' gate catches each planted extra and nothing else; The study counter_decisions does it 1,000 times."""

import pytest

from bench.analysis.tidy import Tidy
from bench.judge.baseline import session_of
from kvcache.strategies.cached import Dynamic
from tests.planted import PLANTED, alarms, counted


def test_an_unchanged_tree_gives_no_alarm() -> None:
    base = session_of(Tidy.of(counted(Dynamic)))
    assert not [alarm for _ in range(10) for alarm in alarms(counted(Dynamic), base)]


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_extra_is_caught(planted: str) -> None:
    proper, mutant, counter = PLANTED[planted]
    base = session_of(Tidy.of(counted(proper)))
    assert counter in {verdict.quantity for verdict in alarms(counted(mutant), base)}
    assert not alarms(counted(proper), base)
