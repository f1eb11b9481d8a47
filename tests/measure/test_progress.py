"""Progress: the share that is done never falls, and the time left comes from the pace so far."""

from typing import Any

import pytest
from rich.progress import Progress

from bench.measure import progress
from bench.measure.progress import ProgressBar


class Clock:
    """Stands still unless it is turned."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()

    def with_clock(*columns: Any, **options: Any) -> Progress:
        return Progress(*columns, **options, get_time=clock)

    monkeypatch.setattr(progress, "Progress", with_clock)
    return clock


def bar() -> ProgressBar:
    return ProgressBar("starting", "done in")


def done(work: ProgressBar) -> float:
    return work._bar.tasks[0].percentage


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_the_pace_so_far_gives_the_time_left(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    work = bar()
    work.expect(100)
    work.begin("first", 20)
    assert last_line(capsys) == "first"  # nothing is known yet
    for _ in range(4):
        clock.now += 15
        work.advance(5)
    work.begin("second", 80)
    assert last_line(capsys) == "second, about 4 min 00 s left"


def test_the_share_that_is_done_never_falls() -> None:
    work, seen = bar(), []
    work.expect(100)
    for part in (10, 30, 60):
        work.begin("a part", part)
        for _ in range(7):
            work.advance(part / 5)  # more turns than expected
            seen.append(done(work))
    assert seen == sorted(seen)
    assert seen[-1] == 100
    assert max(seen[:7]) == 10  # a part is never more than itself


def test_a_part_that_failed_is_done_when_the_next_begins() -> None:
    work = bar()
    work.expect(100)
    work.begin("fails at once", 50)
    assert done(work) == 0
    work.begin("another", 50)
    assert done(work) == 50


def test_the_end_says_how_long_it_took(capsys: pytest.CaptureFixture[str]) -> None:
    with bar() as work:
        work.expect(1)
    assert capsys.readouterr().err == "starting\ndone in 0 s\n"
