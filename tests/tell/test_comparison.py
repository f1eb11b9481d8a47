# ruff: noqa: E501  what documents look like stands here as it is printed
import io
import json
import re

import msgspec
import pytest
from rich.console import Console

from bench.store.derived import Derived
from bench.tell import comparison, ranking, tables, words
from bench.tell.report import write_comparison
from tests.handmade import ENVIRONMENT, compared, grid, make_case, make_run, ranked

MARKDOWN = """\
B (b) against A (a), 2 times of 1 case: faster in 1 (most: dynamic decode, prompt 128, time x 0.500 [0.500-0.500]); no difference shown in 1; 1 other case not comparable.

smollm2-135m, float32, cpu, 2 threads, sdpa, batch 1, 32 new tokens

|   prompt | strategy   | phase   |   A ms |   B ms |               B / A | verdict             |
|---------:|:-----------|:--------|-------:|-------:|--------------------:|:--------------------|
|      128 | dynamic    | prefill |    100 |    100 | 1.000 [1.000-1.000] | no difference shown |
|      128 | dynamic    | decode  |   10.0 |   5.00 | 0.500 [0.500-0.500] | faster              |

A ratio is that of the two medians. Its interval is unpaired: it covers what varies within the runs, not what changed between them.

Only in B (b):

- static, prompt 64: not in A

Differences, A -> B:

- torch: 2.13.0 -> 2.14.0
"""


def test_the_document():
    flat = {"turn_noise": 0, "step_noise": 0}
    a = make_run([make_case()], path="runs/a", ms=lambda _, step: 10.0 if step else 100.0, **flat)
    environment = msgspec.structs.replace(ENVIRONMENT, torch="2.14.0", isa="AVX512")
    b = make_run(
        [make_case(), make_case("static", 64)],
        path="runs/b",
        ms=lambda _, step: 5.0 if step else 100.0,
        environment=environment,
        **flat,
    )
    found = compared(a, b)
    assert comparison.render(found, "md").replace(", on another machine or software", "") == MARKDOWN
    assert json.loads(comparison.render(found, "jsonl").splitlines()[1])["ratio"] == pytest.approx(0.5)
    assert comparison.render(found, "csv") == tables.data(found.rows, "csv")


def test_where_nothing_was_compared_there_is_nothing_to_draw(tmp_path):
    a, b = make_run(grid(["naive"], [32])), make_run(grid(["static"], [64]))
    assert write_comparison(compared(a, b), b, tmp_path / "plots", Derived()) is None
    assert not (tmp_path / "plots").exists()


def test_cases_that_are_excluded_for_one_reason_share_a_line():
    a = make_run(grid(["naive", "dynamic"], [32, 64]), path="runs/a")
    b = make_run(grid(["naive", "dynamic"], [32, 64], dtype="bfloat16"), path="runs/b")
    text = comparison.render(compared(a, b), "md")
    assert (
        "Only in A (a):\n\n- 4 cases, such as naive, prompt 32, float32: not in B, which has it with dtype = bfloat16\n"
        in text
    )


@pytest.mark.parametrize("several", [False, True])
def test_a_terminal_of_80_columns_cuts_no_figure(several):
    """Nothing is wider than the terminal, and every ratio of the document stands in it."""
    runs = [
        make_run(grid(["naive", "dynamic"], [32, 512]), path=f"runs/{name}", seed=n) for n, name in enumerate("abc")
    ]
    found = ranked(runs) if several else compared(*runs[:2])
    module = ranking if several else comparison
    buffer = io.StringIO()
    Console(file=buffer, width=80, color_system=None).print(module.terminal(found), markup=False, highlight=False)
    drawn = buffer.getvalue()
    assert max(map(len, drawn.splitlines())) <= 80
    figures = re.findall(r"\d\.\d{3}", module.render(found, "md").partition("|")[2])
    assert len(figures) > 8
    assert set(figures) <= set(re.findall(r"\d\.\d{3}", drawn))


def test_a_ratio_keeps_its_digits_however_small():
    row = {"ratio": 0.0123, "ratio_low": 0.000412, "ratio_high": 0.5}
    assert words.time_ratio(row) == "0.012 [0.000412-0.500]"
