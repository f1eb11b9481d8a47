"""The time left: learned from the turns of late, and nothing is left of work that will not come."""

from __future__ import annotations

import pytest

from bench.measure.progress import ProgressBar
from tests.handmade import grid

CASES = grid(["dynamic"], [8, 16, 32])


def time_left(capsys: pytest.CaptureFixture[str]) -> str:
    """What the last line on stderr says is left."""
    return capsys.readouterr().err.strip().splitlines()[-1].partition("about ")[2]


def test_the_first_turn_gives_the_pace(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar()
    bar.expect(100)
    bar.done(10, 30, CASES[0])
    assert time_left(capsys) == "4 min 30 s left"


def test_a_check_is_work_done_but_no_pace(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar()
    bar.expect(60)
    bar.done(10, None, CASES[0])
    assert capsys.readouterr().err == ""
    bar.done(10, 10, CASES[0])
    assert time_left(capsys) == "40 s left"


def test_the_pace_is_that_of_late(capsys: pytest.CaptureFixture[str]) -> None:
    """A hundred turns on a machine at rest, then as many under load: the rest is told at the pace under load."""
    bar = ProgressBar()
    bar.expect(300)
    for took_s in (1.0, 2.0):
        for _ in range(100):
            bar.done(1, took_s, CASES[0])
    bar.done(0, 0, CASES[1])
    minutes, seconds = (int(word) for word in time_left(capsys).split()[:3:2])
    assert 60 * minutes + seconds == pytest.approx(200, rel=0.06)


def test_work_that_will_not_come_is_not_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar()
    bar.expect(100)
    bar.done(10, 10, CASES[0])
    bar.expect(-50)
    bar.done(10, 10, CASES[1])
    assert capsys.readouterr().err.splitlines()[-1].endswith("about 30 s left")
    bar.done(40, 40, CASES[2])
    assert capsys.readouterr().err.splitlines()[-1].endswith("nearly done")
