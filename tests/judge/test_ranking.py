"""Several runs ranked: the order, the ratios, what is comparable, and how it is written."""

import json

import msgspec
import pytest

from bench.judge.ranking import BASELINE, COLUMNS, NO_COUNTERPART
from bench.record import Run
from bench.tell import ranking as text
from bench.tell.plots.ranking import ranking_figures
from bench.tell.plots.style import own_settings
from tests.handmade import ENVIRONMENT, compared, fail, grid, make_case, make_run, ranked, smollm2_ms

CASES = grid(["naive", "dynamic"], [32, 512])
FLAT = {"turn_noise": 0, "step_noise": 0}


def run_of(name: str, factor: float = 1.0, cases=CASES, **arguments) -> Run:
    def ms(case, step):
        return factor * smollm2_ms(case, step)

    return make_run(cases, path=f"runs/{name}", ms=ms, **arguments)


def other_model(name: str) -> list:
    return [msgspec.structs.replace(case, model=name) for case in CASES]


def test_each_case_is_ranked_and_its_ratio_is_that_of_compare() -> None:
    a, b, c = run_of("a"), run_of("b", 2.0, seed=1), run_of("c", 0.5, seed=2)
    ranking = ranked([a, b, c])
    assert ranking.apart == []
    rows = ranking.against()
    assert len(rows) == 3 * 8
    assert list(rows["run"][:3]) == ["C", "A", "B"]
    assert list(rows["rank"][:3]) == [1, 2, 3]
    assert set(rows.loc[rows["run"] == "A", "verdict"]) == {BASELINE}
    for run, name in ((b, "B"), (c, "C")):
        pair = compared(a, run).rows.set_index(["strategy", "n_prompt", "phase"])
        own = rows[rows["run"] == name].set_index(["strategy", "n_prompt", "phase"]).reindex(pair.index)
        for column in ("ratio", "ratio_low", "ratio_high"):
            assert own[column].to_list() == pytest.approx(pair[column].to_list())
        assert own["verdict"].to_list() == pair["verdict"].to_list()
    assert ranking.exit_code == 0


def test_any_run_can_be_the_baseline() -> None:
    ranking = ranked([run_of("a"), run_of("b", 2.0), run_of("c", 0.5)])
    first, other = ranking.against(0), ranking.against(1)
    assert set(other.loc[other["run"] == "B", "verdict"]) == {BASELINE}
    ratios = [rows.loc[rows["run"] == run, "ratio"].to_numpy() for rows, run in ((first, "B"), (other, "A"))]
    assert ratios[0] == pytest.approx(1 / ratios[1])
    count, places = ranking.standings(1)["decode"]
    assert (count, [one.run for one in places]) == (4, ["C", "A", "B"])
    assert [one.ratio for one in places] == pytest.approx([0.25, 0.5, 1.0], rel=0.05)


def test_runs_of_different_models_are_grouped_by_what_they_share() -> None:
    runs = [run_of(name, factor, other_model(name)) for name, factor in (("small", 1.0), ("large", 3.0), ("tiny", 0.1))]
    ranking = ranked(runs)
    assert ranking.apart == ["model"]
    rows = ranking.against()
    assert list(rows["run"][:3]) == ["C", "A", "B"]
    assert rows["ratio"].notna().all()
    assert ranking.exit_code == 0
    assert text.run_lines(ranking) == [
        "- A: small, model small, baseline\n",
        "- B: large, model large\n",
        "- C: tiny, model tiny\n",
    ]
    assert "float32, cpu, 2 threads, sdpa, batch 1, 32 new tokens\n" in text.render(ranking, "md")


def test_on_a_gpu_a_ranking_names_no_threads() -> None:
    cases = [msgspec.structs.replace(case, device="cuda") for case in CASES]
    ranking = ranked([run_of(name, cases=cases) for name in "abc"])
    ((title, _),) = text.by_shared_setting(ranking, ranking.against())
    assert title == "smollm2-135m, float32, cuda, sdpa, batch 1, 32 new tokens"


def test_a_strategy_of_its_own_stands_beside_all_of_the_baselines() -> None:
    """As an import of another engine does: it has no counterpart, so no ratio."""
    own = [msgspec.structs.replace(case, strategy="theirs") for case in CASES[1::2]]
    ranking = ranked([run_of("a"), run_of("b"), run_of("c", 0.1, own)])
    assert ranking.apart == ["strategy"]
    rows = ranking.against()
    decode = rows[(rows["n_prompt"] == 512) & (rows["phase"] == "decode")]
    assert len(decode) == 5
    assert decode["run"].iloc[0] == "C"
    assert set(decode.loc[decode["run"] == "C", "verdict"]) == {NO_COUNTERPART}
    assert decode.loc[decode["run"] == "B", "ratio"].notna().all()
    with own_settings():
        (figure,) = ranking_figures(ranking, rows).values()
    assert "ms" in figure.axes[0].get_xlabel()  # without a ratio for all, the times themselves


def test_a_length_is_never_left_out_of_what_is_shared() -> None:
    cases = [grid(["dynamic"], [n]) for n in (32, 64, 128)]
    ranking = ranked([run_of(f"r{n}", 1.0, own) for n, own in enumerate(cases)])
    assert (ranking.entries.empty, ranking.exit_code) == (True, 3)
    written = text.render(ranking, "md")
    assert written.startswith("Nothing could be ranked: no case has a time in all 3 runs.\n")
    assert "- B: 2 cases, such as dynamic, prompt 32: not in it\n" in written
    assert ranking_figures(ranking, ranking.against()) == {}


def test_what_failed_or_has_other_weights_is_not_compared_and_named() -> None:
    changed = run_of("c")
    weights = dict.fromkeys(changed.manifest.weights, "other")
    changed = msgspec.structs.replace(changed, manifest=msgspec.structs.replace(changed.manifest, weights=weights))
    failed = run_of("b", failures=[fail(CASES[3])])
    ranking = ranked([run_of("a"), failed, changed])
    rows = ranking.against()
    assert set(rows["run"]) == {"A", "B"}
    assert len(rows) == 2 * 6
    assert ranking.exit_code == 3
    written = text.exclusions(ranking)
    assert "- B: dynamic, prompt 512: oom: not enough memory\n" in written
    assert "- C: 4 cases, such as naive, prompt 32: the weights of smollm2-135m differ\n" in written
    nowhere = ranked([run_of(name, failures=[fail(CASES[3])]) for name in "abc"])
    assert (nowhere.lacking, nowhere.exit_code) == ([], 0)
    assert "Without a time in any run" in text.exclusions(nowhere)


MARKDOWN = """\
Ranked by time / time of A, geometric mean over the cases that all 3 runs have: prefill A 1.000, C 1.000, B 2.000 \
(1 case); decode C 0.500, A 1.000, B 2.000 (1 case).

- A: a, baseline
- B: b, on another machine or software
- C: c

smollm2-135m, float32, cpu, 2 threads, sdpa, batch 1, 32 new tokens

|   prompt | phase   | strategy   |   rank | run   |               ms |                 / A | verdict             |
|---------:|:--------|:-----------|-------:|:------|-----------------:|--------------------:|:--------------------|
|      128 | prefill | dynamic    |      1 | A     |    100 [100-100] |                   1 | -                   |
|      128 | prefill | dynamic    |      2 | C     |    100 [100-100] | 1.000 [1.000-1.000] | no difference shown |
|      128 | prefill | dynamic    |      3 | B     |    200 [200-200] | 2.000 [2.000-2.000] | slower              |
|      128 | decode  | dynamic    |      1 | C     | 5.00 [5.00-5.00] | 0.500 [0.500-0.500] | faster              |
|      128 | decode  | dynamic    |      2 | A     | 10.0 [10.0-10.0] |                   1 | -                   |
|      128 | decode  | dynamic    |      3 | B     | 20.0 [20.0-20.0] | 2.000 [2.000-2.000] | slower              |

A ratio is that of the two medians. Its interval is unpaired: it covers what varies within the runs, not what changed \
between them.

Differences from A:

- A -> B, torch: 2.13.0 -> 2.14.0
"""


def test_the_document() -> None:
    environment = msgspec.structs.replace(ENVIRONMENT, torch="2.14.0")
    a = make_run([make_case()], path="runs/a", ms=lambda _, step: 10.0 if step else 100.0, **FLAT)
    b = make_run([make_case()], path="b", ms=lambda _, step: 20.0 if step else 200.0, environment=environment, **FLAT)
    c = make_run([make_case()], path="runs/c", ms=lambda _, step: 5.0 if step else 100.0, **FLAT)
    ranking = ranked([a, b, c])
    assert text.render(ranking, "md") == MARKDOWN
    rows = json.loads(text.render(ranking, "json"))
    assert list(rows[0]) == COLUMNS
    assert (rows[3]["run"], rows[3]["name"], rows[3]["rank"], rows[3]["machine"]) == ("C", "c", 1, "bench-1")
    assert text.render(ranking, "csv").startswith("model,strategy,device,")
