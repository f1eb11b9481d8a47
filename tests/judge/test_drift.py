# ruff: noqa: E501  what tables look like stands here as it is printed
from pathlib import Path

import msgspec
import pytest

from bench.analysis.tidy import Tidy
from bench.judge.baseline import session_of
from bench.judge.drift import drift
from bench.store.sessions import Session
from bench.tell.drift import markdown
from bench.tell.plots.drift import figure
from bench.tell.plots.style import save
from tests.handmade import ENVIRONMENT, grid, make_run

CASES = grid(["naive", "dynamic"], [32, 128], n_gen=4)


def sessions(*factors: float, environments: tuple = ()) -> list[Session]:
    made = []
    for number, factor in enumerate(factors):
        environment = environments[number] if environments else ENVIRONMENT
        run = make_run(
            CASES, ms=lambda case, step, f=factor: 40.0 * f, turn_noise=0, step_noise=0, environment=environment
        )
        session = session_of(Tidy.of(run))
        created = f"2026-11-{number + 1:02}T04:00:00Z"
        made.append(msgspec.structs.replace(session, run_id=f"run-{number}", created_utc=created))
    return made


def test_times_are_relative_to_the_first_session_of_the_machine() -> None:
    other = msgspec.structs.replace(ENVIRONMENT, torch="2.14")
    found = drift(sessions(1, 1.1, 2, 1, environments=(ENVIRONMENT, ENVIRONMENT, other, other)))
    dynamic = found[(found["strategy"] == "dynamic") & (found["phase"] == "decode")]
    assert dynamic["relative_time"].to_list() == pytest.approx([1, 1.1, 1, 0.5])
    assert dynamic["machine"].to_list() == [1, 1, 2, 2]
    assert set(dynamic["cases"]) == {2}


def test_counters_that_grew_are_told() -> None:
    one, two = sessions(1, 1)
    row = two.figures[1]
    more = msgspec.structs.replace(row.counters, copied_bytes=row.counters.copied_bytes + 1)
    two = msgspec.structs.replace(two, figures=[msgspec.structs.replace(row, counters=more), *two.figures[2:]])
    found = drift([one, two])
    assert found["more_work"].sum() == 1
    assert "1 counters" in markdown(found)


def test_the_table() -> None:
    assert markdown(drift(sessions(1, 1.25))) == (
        "Times relative to the first session of the same machine and software:\n\n"
        "| measured         |   machine |   naive prefill |   dynamic prefill |   naive decode |   dynamic decode |   more work |\n"
        "|:-----------------|----------:|----------------:|------------------:|---------------:|-----------------:|------------:|\n"
        "| 2026-11-01 04:00 |         1 |           1.000 |             1.000 |          1.000 |            1.000 |           - |\n"
        "| 2026-11-02 04:00 |         1 |           1.250 |             1.250 |          1.250 |            1.250 |           - |\n"
    )


@pytest.mark.parametrize("n", [1, 2, 3, 30])
def test_sessions_are_numbered_by_whole_numbers(n: int) -> None:
    for axes in figure(drift(sessions(*[1.0] * n)), "laptop").axes:
        low, high = axes.get_xlim()
        shown = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert shown
        assert all(tick == int(tick) and 1 <= tick <= n for tick in shown)


def test_the_plot_has_a_line_per_strategy_and_units(tmp_path: Path) -> None:
    drawn = figure(drift(sessions(1, 1.02, 0.97)), "laptop")
    prefill, decode = drawn.axes
    assert [line.get_label() for line in decode.get_lines()][:2] == ["naive", "dynamic"]
    assert prefill.get_ylabel() == "time / time of the first session"
    assert save(drawn, tmp_path / "drift")[0].stat().st_size > 0
