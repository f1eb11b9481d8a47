import functools
import warnings

import numpy as np
import pytest

from bench.analysis.summary import summarize
from bench.analysis.tidy import Tidy
from bench.tell.plots import rows
from bench.tell.plots import waterfall as falls
from bench.tell.plots.ladder import LIMIT
from bench.tell.plots.run import against_roofs
from tests.handmade import fail, floors_ms, grid, make_run, smollm2_plan, steady_roofs
from tests.tell.test_plots import assert_readable, legend, ticks

ALL = ["naive", "dynamic", "static", "hf-generate", "compiled"]


def ms(case, step):
    return (1.1 if case.strategy == "compiled" else 1.7) * max(floors_ms(case, step)) + 5


def floors_of(cases, **arguments):
    run = make_run(cases, **({"ms": ms, "plan": smollm2_plan, "roofs": steady_roofs} | arguments))
    return summarize(Tidy.of(run))


def figures_of(cases, **arguments):
    floors = floors_of(cases, **arguments)
    return {name: draw() for name, draw in against_roofs(floors[floors["latency_ms"].notna()]).items()}


ROWS = [2**power for power in range(10)]
SWEEP = [case for depth in (0, 512, 2048) for case in grid(["dynamic"], ROWS, n_gen=1, n_depth=depth)]
LADDER = grid(ALL, [32, 128, 512, 2048])
THREADS = [case for count in (1, 2) for case in grid(["naive", "dynamic"], [128, 512], n_threads=count)]
CASES = {"rows": SWEEP, "ladder": LADDER, "threads": THREADS}


@functools.cache
def drawn_of(name):
    return figures_of(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_no_text_is_hidden_or_cut_off(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for figure in drawn_of(name).values():
            assert_readable(figure)


def test_a_plot_is_drawn_where_the_run_has_its_data_and_only_there():
    assert set(drawn_of("rows")) == {"rows"}
    assert set(drawn_of("ladder")) == {"waterfall", "ladder"}
    assert set(drawn_of("threads")) == {f"{name}-t{count}" for name in ("waterfall", "ladder") for count in (1, 2)} | {
        "threads"
    }
    assert figures_of(LADDER, roofs=None) == {}
    assert figures_of(grid(["dynamic"], [128])) == {}
    assert "waterfall" not in figures_of(grid(["dynamic", "static"], [128]))
    assert set(figures_of(LADDER[:2], failures=[fail(LADDER[0])])) == set()
    assert figures_of(SWEEP[:3]) == {}  # three row counts show no bend
    assert figures_of(grid(["dynamic"], [64, 128, 256, 512], n_gen=1)) == {}


def test_rows_of_a_forward_against_both_roofs():
    figure = drawn_of("rows")["rows"]
    assert figure.get_suptitle().splitlines() == [
        "Time of a forward against the rows it is fed, dynamic, median with 95 % intervals",
        "smollm2-135m, float32, cpu, 2 threads, sdpa",
    ]
    assert legend(figure) == [
        "0 tokens cached before",
        "512 tokens cached before",
        "2,048 tokens cached before",
        "weights and KV read at 40.0 GB/s",
        "FLOPs at 400 GFLOP/s",
    ]
    (axes,) = figure.axes
    assert axes.get_xlabel() == "rows in a forward (new tokens x batch), log scale"
    assert axes.get_ylabel() == "time of a forward (ms), log scale"
    assert [text.get_text().splitlines()[0] for text in axes.texts] == ["the roofs cross at 24.9 rows:"]


def test_the_roofs_cross_where_both_floors_are_equal():
    frame = floors_of(SWEEP[:10]).assign(rows=ROWS)
    crossing = rows.crossing_rows(frame)
    compute, memory = (np.interp(crossing, ROWS, frame[f"{name}_floor_ms"]) for name in ("compute", "memory"))
    assert compute == pytest.approx(memory, rel=0.05)
    assert rows.crossing_rows(frame[frame["rows"] < 16]) is None
    assert rows.crossing_rows(frame[frame["rows"] > 32]) is None


def test_roofs_that_drifted_from_cell_to_cell_are_drawn_at_their_medians():
    def drifting(case, number):
        return {name: rate * (2 if case.n_prompt == 8 else 1) for name, rate in steady_roofs(case, number).items()}

    def roofs(figure):
        return [list(line.get_ydata()) for line in figure.axes[0].lines if " at " in str(line.get_label())]

    drifted = roofs(figures_of(SWEEP, roofs=drifting)["rows"])
    assert drifted == [pytest.approx(line) for line in roofs(drawn_of("rows")["rows"])]


def test_a_batch_of_prompts_is_rows_too():
    batches = [case for size in (1, 2, 4, 8) for case in grid(["dynamic"], [1, 64], batch_size=size, n_gen=1)]
    (line, *_) = figures_of(batches)["rows"].axes[0].lines
    assert list(line.get_xdata()) == [1, 2, 4, 8, 64, 128, 256, 512]


def test_the_parts_of_a_waterfall_are_the_whole_step():
    frame = floors_of(LADDER)
    naive, cached = (row for _, row in falls.waterfall_cell(frame).iterrows())
    assert (naive["strategy"], cached["strategy"], cached["n_prompt"]) == ("naive", "dynamic", 2048)
    parts = falls.waterfall_parts(frame, cached)
    assert list(parts) == list(falls.PARTS)
    assert sum(parts.values()) == pytest.approx(cached["latency_ms"])
    assert parts["weights read"] == pytest.approx(smollm2_plan(LADDER[0]).weights_bytes / 40e9 * 1000, rel=0.01)
    assert parts["KV read"] == pytest.approx((2048 + 16) * 46080 / 40e9 * 1000, rel=0.01)
    assert parts["framework"] == pytest.approx(0.9)
    title = " ".join(drawn_of("ladder")["waterfall"].get_suptitle().split())
    assert "processes 2064 times the tokens, dynamic is" in title


@pytest.mark.parametrize("framework_ms", [float("nan"), 1e6])
def test_what_a_run_does_not_tell_apart_is_one_bar(framework_ms):
    frame = floors_of(LADDER).assign(framework_ms=framework_ms)
    _, cached = (row for _, row in falls.waterfall_cell(frame).iterrows())
    parts = falls.waterfall_parts(frame, cached)
    assert list(parts) == ["weights read", "KV read", falls.UNKNOWN]
    assert sum(parts.values()) == pytest.approx(cached["latency_ms"])
    assert_readable(falls.waterfall(frame))


def test_the_ladder_ends_at_the_limit_and_has_a_line_per_prompt():
    figure = drawn_of("ladder")["ladder"]
    assert [axes.get_title() for axes in figure.axes] == ["prefill", "decode"]
    rungs = ticks(figure.axes[0].yaxis)
    assert (rungs[:3], sorted(rungs[3:5]), rungs[5]) == (["naive", "dynamic", "static"], sorted(ALL[3:]), LIMIT)
    assert legend(figure) == [f"prompt {n_prompt}" for n_prompt in (32, 128, 512, 2048)]
    for panel, step in ((0, 0), (1, 1)):
        for line, case in zip(figure.axes[panel].lines, LADDER[1::5], strict=True):
            assert line.get_xdata()[-1] == pytest.approx(max(floors_ms(case, step)), rel=1e-3)


def test_threads_are_compared_with_the_fewest_at_the_longest_prompt():
    figure = drawn_of("threads")["threads"]
    assert "prompt 512" in figure.get_suptitle()
    assert legend(figure) == ["as many times as threads", "naive", "dynamic"]
    prefill, decode = (
        {line.get_label(): line.get_ydata()[-1] for line in axes.lines if line.get_label() == "dynamic"}["dynamic"]
        for axes in figure.axes
    )
    assert prefill > 1.8
    assert decode == pytest.approx(1, rel=0.05)
