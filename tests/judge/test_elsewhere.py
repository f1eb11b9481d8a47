"""An import beside a run of ours: what of both can be ranked, and how it is marked."""

import msgspec
import pytest

from bench.judge.elsewhere import work
from bench.judge.ranking import SEVERAL
from bench.manifest import ELSEWHERE, Origin
from bench.record import Run
from bench.store.derived import Derived
from bench.tell import ranking as text
from bench.tell.plots.ranking import ranking_figures
from bench.tell.plots.style import own_settings
from bench.tell.report import write_comparison
from tests.handmade import compared, grid, make_case, make_run, ranked
from tests.tell.test_exchange import PP, TG, store
from tests.tell.test_machine_plots import figures_of
from tests.tell.test_plots import assert_readable

PROMPTED = grid(["dynamic"], [512], n_gen=32)
"""What `-p 512 -n 32` measures."""


@pytest.fixture
def theirs(tmp_path) -> Run:
    """A run of pp512 and tg128 @ d512: 72 ms, and 1 ms a token."""
    return store(tmp_path, PP, TG)[0].run


def ours(cases=PROMPTED, path: str = "runs/ours") -> Run:
    return make_run(cases, ms=lambda _, step: 2.0 if step else 36.0, turn_noise=0, step_noise=0, path=path)


def test_an_import_is_ranked_with_our_own_prompt_and_what_follows_it(theirs: Run) -> None:
    ranking = ranked([ours(), theirs])
    assert (ranking.lacking, ranking.exit_code) == ([], 0)
    rows = ranking.against()
    written = [(row.phase, row.run, row.n_prompt, row.n_depth, row.n_gen, row.rank) for row in rows.itertuples()]
    assert written == [
        ("prefill", "A", 512, 0, 32, 1),
        ("prefill", "B", 512, 0, 1, 2),
        ("decode", "B", 1, 512, 128, 1),
        ("decode", "A", 512, 0, 32, 2),
    ]
    imported = rows[rows["run"] == "B"]
    assert imported["ratio"].to_list() == pytest.approx([2.0, 0.5])
    assert imported["ratio_low"].isna().all()
    assert set(imported["verdict"]) == {ELSEWHERE}
    document = text.render(ranking, "md")
    assert f"- B: 20260424T115850Z-llama-bench, {ELSEWHERE}, model llama 135M F16" in document
    assert " new tokens |" in document
    assert "\ncpu, 2 threads, batch 1\n" in document


@pytest.mark.parametrize(
    ("case", "pairs"),
    [
        (make_case(n_prompt=512, n_gen=129), True),  # the very same steps
        (make_case(n_prompt=1, n_depth=512, n_gen=128), True),
        (make_case(n_prompt=256, n_depth=256, n_gen=8), True),
        (make_case(n_prompt=511, n_gen=32), False),
        (make_case(n_prompt=512, n_gen=1024), False),  # attends to twice as many tokens on average
    ],
)
def test_decoding_is_ranked_from_the_same_depth_on(theirs: Run, case, pairs: bool) -> None:
    rows = ranked([ours([case]), theirs]).entries
    assert ("decode" in set(rows["phase"])) is pairs


def test_a_generation_as_long_as_its_context_is_ranked_with_an_equal_one_alone() -> None:
    from_nothing = make_case(n_prompt=1, n_gen=128)
    assert work(from_nothing, "decode") != work(make_case(n_prompt=1, n_gen=64), "decode")
    assert work(from_nothing, "decode") == work(make_case(n_prompt=1, n_gen=128), "decode")


def test_runs_of_ours_alone_are_ranked_by_equal_lengths() -> None:
    other = ours([msgspec.structs.replace(case, n_gen=16) for case in PROMPTED], "runs/other")
    assert ranked([ours(), other]).entries.empty


def test_two_strategies_of_ours_leave_no_ratio_but_say_why(theirs: Run) -> None:
    mine = ours(grid(["dynamic", "static"], [512]))
    for runs in ([mine, theirs], [theirs, mine]):
        rows = ranked(runs).against()
        assert set(rows.loc[rows["run"] == "B", "verdict"]) == {ELSEWHERE}


def test_runs_of_ours_keep_their_ratios_beside_an_import(theirs: Run) -> None:
    """A prompt of 512 and one of 256 after 256 are one group there; each has its equal in the baseline."""
    cases = [*PROMPTED, make_case(n_prompt=256, n_depth=256)]
    rows = ranked([ours(cases), ours(cases, "runs/again"), theirs]).against()
    decode = rows[rows["phase"] == "decode"]
    assert len(set(decode["group"])) == 1
    assert list(decode.loc[decode["run"] == "B", "ratio"]) == [1.0, 1.0]
    assert set(decode.loc[decode["run"] == "C", "verdict"]) == {ELSEWHERE}
    unlike = [make_case(n_prompt=384, n_depth=128)]
    rows = ranked([ours(cases), ours(unlike, "runs/unlike"), theirs]).against()
    assert set(rows.loc[(rows["run"] == "B") & (rows["phase"] == "decode"), "verdict"]) == {SEVERAL}


def suptitle(figure) -> str:
    return " ".join(figure.get_suptitle().split())


def test_a_ranking_is_drawn_with_one_line_per_prompt_and_the_import_marked(theirs: Run) -> None:
    ranking = ranked([ours(), theirs])
    with own_settings():
        (figure,) = ranking_figures(ranking, ranking.against()).values()
    assert "A: ours B: 20260424T115850Z-llama-bench, measured elsewhere" in suptitle(figure)
    assert "without intervals (measured elsewhere)" in suptitle(figure)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["prompt 512"]
    assert_readable(figure)


def test_the_figures_of_an_import_say_so(theirs: Run) -> None:
    drawn = figures_of(theirs)
    assert drawn
    for figure in drawn.values():
        assert suptitle(figure).partition(", prompt")[0].endswith(f", {ELSEWHERE}")
        assert_readable(figure)


def test_so_do_those_of_a_comparison_of_equal_cases(theirs: Run, tmp_path, monkeypatch) -> None:
    drawn = {}
    monkeypatch.setattr("bench.tell.report.save_all", lambda draw, folder, derived: drawn.update(draw()))
    mine = msgspec.structs.replace(theirs, path="runs/mine", manifest=_without_origin(theirs))
    write_comparison(compared(mine, theirs), theirs, tmp_path, Derived())
    for figure in drawn.values():
        assert f"A: mine B: 20260424T115850Z-llama-bench, {ELSEWHERE}" in suptitle(figure)
    assert {name.partition("-")[0] for name in drawn} == {"forest", "overlay"}


def _without_origin(run: Run):
    assert isinstance(run.manifest.origin, Origin)
    return msgspec.structs.replace(run.manifest, origin=None)
