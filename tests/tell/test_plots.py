import functools
import itertools
import warnings

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.text import Text

from bench.analysis import slopes, summary
from bench.analysis.tidy import Tidy
from bench.tell.drawn import MOST_CASES, MOST_CONTEXTS, MOST_LINES, MOST_PLOTS, cases_line, few_contexts, limits_line
from bench.tell.plots import comparison, style
from bench.tell.plots import run as run_plots
from bench.tell.representative import representative_line
from tests.handmade import compared, fail, grid, make_case, make_run, smollm2_ms, steady_roofs

USUAL = ["naive", "dynamic", "static", "hf-generate"]
ALL = ["naive", "dynamic", "static", "compiled", "hf-generate"]


def figures_of(run):
    tidy = Tidy.of(run)
    groups = run_plots.groups(summary.summarize(tidy), tidy.steps, slopes.slopes(tidy.steps))
    return {name: draw() for listed in groups for name, draw in listed().items()}


def comparison_of(cases, factor=0.8, **arguments):
    a = make_run(cases, turn_noise=0.03, path="runs/before", **arguments)
    slower = {"ms": lambda case, step: smollm2_ms(case, step) * factor}
    found = compared(a, make_run(cases, turn_noise=0.03, seed=1, path="runs/after", **slower, **arguments))
    return comparison.comparison_figures(found.rows, found.a, found.b)


USUAL_RUN = make_run(grid(USUAL, [32, 128, 512, 2048]), turn_noise=0.03)


@functools.cache  # not when the module is imported, which every process of pytest-xdist does
def usual_figures():
    return figures_of(USUAL_RUN)


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def ticks(axis):
    return [text for tick in axis.get_ticklabels() if (text := tick.get_text())]


def labels(figure):
    return [(axes.get_xlabel(), axes.get_ylabel()) for axes in figure.axes]


def texts(figure):
    """Every piece of text that is drawn inside the picture, with its box in pixels."""
    figure.draw_without_rendering()  # lays out all that is drawn
    renderer = figure.canvas.get_renderer()
    shown = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    for axes in figure.axes:  # ticks beyond the limits exist and are not drawn
        for axis, (low, high) in ((axes.xaxis, sorted(axes.get_xlim())), (axes.yaxis, sorted(axes.get_ylim()))):
            for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
                if not low <= tick.get_loc() <= high:
                    shown = [text for text in shown if text not in (tick.label1, tick.label2)]
    return [(text.get_text(), text.get_window_extent(renderer)) for text in shown]


def assert_readable(figure):
    boxes = texts(figure)
    inner = [(text, box.shrunk(0.99, 0.99)) for text, box in boxes]
    for (one, box), (other, other_box) in itertools.combinations(inner, 2):
        assert not box.overlaps(other_box), f"{one!r} overlaps {other!r}"
    picture = figure.bbox
    for text, box in boxes:
        assert picture.x0 <= box.x0, f"{text!r} is cut off"
        assert box.x1 <= picture.x1, f"{text!r} is cut off"
        assert picture.y0 <= box.y0, f"{text!r} is cut off"
        assert box.y1 <= picture.y1, f"{text!r} is cut off"
    panels = [axes.get_tightbbox() for axes in figure.axes if figure.legends]
    for figure_legend in figure.legends:
        box = figure_legend.get_window_extent()
        assert not any(box.overlaps(panel) for panel in panels), "the legend lies over the axes"


RUNS = {
    "usual": lambda: USUAL_RUN,
    "one context": lambda: make_run(grid(ALL, [128])),
    "ten contexts": lambda: make_run(
        grid(ALL, [2**power for power in range(4, 14)], model="/home/me/checkpoints/llama-3.2-1b")
    ),
    "contexts close together": lambda: make_run(grid(["naive", "mine", "yours"], [100, 110, 128, 1000]), rounds=3),
    "naive alone": lambda: make_run(grid(["naive"], [32, 2048])),
    "without naive": lambda: make_run(grid(["dynamic", "static"], [32, 2048])),
    "one token": lambda: make_run(grid(["naive", "dynamic"], [32, 64], n_gen=1)),
    "two tokens": lambda: make_run(grid(["naive", "dynamic"], [32], n_gen=2)),
    "gpu": lambda: make_run(grid(USUAL, [128, 8192], device="cuda", dtype="bfloat16", n_depth=512)),
}


@pytest.mark.parametrize("name", RUNS)
def test_no_text_is_hidden_or_cut_off_in_a_plot_of_a_run(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = figures_of(RUNS[name]())
        assert "throughput" in drawn
        for figure in drawn.values():
            assert_readable(figure)


COMPARED = [
    (1.0, grid(USUAL, [32, 2048]), 6),
    (1.3, grid(["dynamic"], [32, 2048]), 6),
    (0.02, grid(["naive", "dynamic"], [32, 2048]), 3),
    (0.8, [make_case(n_gen=1)], 6),
]


@pytest.mark.parametrize(("factor", "cases", "n_rounds"), COMPARED)
def test_no_text_is_hidden_or_cut_off_in_a_plot_of_a_comparison(factor, cases, n_rounds):
    for figure in comparison_of(cases, factor, rounds=n_rounds).values():
        assert_readable(figure)


def test_latency_of_each_step():
    figure = usual_figures()["step_latency"]
    assert figure.get_suptitle().splitlines() == [
        "Latency of each decode step; big markers: TPOT as in the table, with 95 % intervals",
        "smollm2-135m, float32, cpu, 2 threads, sdpa, batch 1",
    ]
    assert labels(figure) == [
        ("position (tokens before the new one), log scale", "latency of one step (ms), log scale"),
        ("position (tokens before the new one)", "latency of one step (ms)"),
    ]
    fitted = slopes.slopes(Tidy.of(USUAL_RUN).steps).set_index("strategy")
    assert [text.split("  ")[0] for text in legend(figure)] == USUAL
    shown = float(legend(figure)[1].split()[1])
    assert shown == pytest.approx(fitted.loc["dynamic", "slope_ms_per_1000_tokens"], rel=0.01)
    assert figure.legends[0].get_title().get_text() == "slope in ms per 1,000 tokens [95 % interval]"
    assert ticks(figure.axes[0].xaxis) == ["2,048", "512", "128", "32"]
    assert figure.axes[1].get_ylim()[0] == 0


def test_every_step_is_within_the_axes_however_many_there_are_after_a_prompt():
    for lengths in ([16], [16, 24]):
        run = make_run(grid(["naive", "dynamic"], lengths, n_gen=32))
        for axes in figures_of(run)["step_latency"].axes:
            (low, high), steps = axes.get_xlim(), [x for line in axes.lines for x in line.get_xdata()]
            assert low < min(steps) <= max(steps) < high
            assert max(steps) == max(lengths) + 31


@pytest.mark.parametrize(("lengths", "scale"), [([64], "linear"), ([64, 128], "log")])
def test_one_length_alone_has_a_straight_axis(lengths, scale):
    cases = grid(["naive", "dynamic"], lengths)
    for figure in (figures_of(make_run(cases))["step_latency"], comparison_of(cases)["overlay"]):
        assert {axes.get_xscale() for axes in figure.axes} <= {scale, "linear"}
        assert figure.axes[0].get_xscale() == scale
        assert any("log scale" in axes.get_xlabel() for axes in figure.axes) == (scale == "log")
        assert_readable(figure)
        assert len(ticks(figure.axes[-1].xaxis)) > 1


def test_throughput():
    figure = usual_figures()["throughput"]
    assert figure.get_suptitle().startswith(
        "Throughput, median with 95 % intervals\nsmollm2-135m, float32, cpu, 2 threads"
    )
    assert labels(figure) == [
        ("context length (tokens), log scale", "throughput (tokens/s)"),
        ("context length (tokens), log scale", "throughput (tokens/s), log scale"),
    ]
    assert [axes.get_title() for axes in figure.axes] == ["prefill", "decode"]
    assert legend(figure) == USUAL
    decode = summary.summarize(Tidy.of(USUAL_RUN)).query("phase == 'decode' and strategy == 'dynamic'")
    (line,) = [line for line in figure.axes[1].lines if line.get_label() == "dynamic"]
    assert list(line.get_ydata()) == pytest.approx(decode["tokens_per_s"].to_list())


def test_speedup():
    figure = usual_figures()["speedup"]
    assert figure.get_suptitle().startswith("Speed-up over naive re-feed with 95 % intervals\n")
    assert labels(figure) == [
        ("context length (tokens), log scale", "speed-up (times)"),
        ("context length (tokens), log scale", "speed-up (times), log scale"),
    ]
    assert legend(figure) == ["naive = 1", "dynamic", "static", "hf-generate"]
    assert figure.axes[1].get_ylim()[0] < 1 < figure.axes[1].get_ylim()[1]


def test_intervals_reach_from_low_to_high():
    rows = summary.summarize(Tidy.of(USUAL_RUN)).query("phase == 'decode' and strategy == 'static'")
    axes = usual_figures()["speedup"].axes[1]
    bars = [segment[:, 1] for collection in axes.collections for segment in collection.get_segments()]
    for low, high in zip(rows["speedup_low"], rows["speedup_high"], strict=True):
        assert any(bar == pytest.approx([low, high]) for bar in bars)


def test_too_few_rounds_are_said_in_the_title():
    drawn = figures_of(make_run(grid(["naive", "dynamic"], [32, 128]), rounds=3))
    assert drawn["throughput"].get_suptitle().startswith("Throughput, median (too few rounds for intervals)")


def test_strategies_differ_in_marker_and_line_not_in_colour_alone():
    names = [*ALL, "mine", "yours", "theirs", "ours"]
    assert len({style.marker for style in style.styles(names).values()}) == len(names)
    assert len({style.line for style in style.styles(names).values()}) == len(names)
    assert style.styles(["static"])["static"] == style.styles(names)["static"]


def test_each_setting_has_plots_of_its_own_named_after_what_differs():
    cases = [
        *grid(["naive", "dynamic"], [32, 64]),
        *grid(["naive", "dynamic"], [32, 64], dtype="bfloat16", n_depth=512),
    ]
    assert sorted(figures_of(make_run(cases))) == [
        "speedup-bfloat16-d512",
        "speedup-float32-d0",
        "step_latency-bfloat16",
        "step_latency-float32",
        "throughput-bfloat16-d512",
        "throughput-float32-d0",
    ]
    paths = [*grid(["dynamic"], [32], model="py:a.b:make"), *grid(["dynamic"], [32], model="models/x")]
    assert max(figures_of(make_run(paths))) == "throughput-py_a.b_make"
    alike = [*grid(["dynamic"], [32], model="a/b"), *grid(["dynamic"], [32], model="a_b")]
    assert {name for name in figures_of(make_run(alike)) if "through" in name} == {
        f"throughput-a_b-{n}" for n in (1, 2)
    }


def test_what_failed_is_left_out_and_a_run_without_times_has_no_plots():
    cases = grid(["naive", "dynamic", "static"], [32, 128])
    drawn = figures_of(make_run(cases, failures=[fail(case) for case in cases if case.strategy == "static"]))
    assert legend(drawn["throughput"]) == ["naive", "dynamic"]
    assert figures_of(make_run(cases, failures=[fail(case) for case in cases])) == {}


def test_forest():
    figure = comparison_of(grid(["naive", "dynamic"], [32, 512]), factor=0.5)["forest"]
    assert figure.get_suptitle().splitlines() == [
        "Time of B / time of A, unpaired, with 95 % intervals",
        "smollm2-135m, float32, cpu, 2 threads, sdpa, batch 1, 32 new tokens",
        "A: before   B: after",
    ]
    (axes,) = figure.axes
    assert axes.get_xlabel() == "B is faster   <   time of B / time of A (ratio)   >   B is slower"
    assert sorted(ticks(axes.yaxis)) == sorted(
        f"{strategy} {phase}, prompt {n_prompt}"
        for strategy in ("naive", "dynamic")
        for phase in ("prefill", "decode")
        for n_prompt in (32, 512)
    )
    assert legend(figure) == ["prefill", "decode"]
    low, high = axes.get_xlim()
    assert low * high == pytest.approx(1)
    assert low < 0.5


def test_forest_is_sorted_with_the_largest_gain_on_top():
    cases = grid(["naive", "dynamic"], [32, 512])
    figure = comparison_of(cases)["forest"]
    points = {
        round(y): x
        for line in figure.axes[0].lines
        if line.get_marker() in {"o", "s"}
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
    }
    assert [points[place] for place in sorted(points)] == sorted(points.values(), reverse=True)


def test_overlay():
    figure = comparison_of(grid(["naive", "dynamic"], [32, 512]))["overlay"]
    assert legend(figure) == ["A", "B"]
    named = [label for _, label in labels(figure) if label]
    assert named == ["prefill: TTFT (ms), log scale", "decode: TPOT (ms), log scale"]
    assert_readable(figure)


def test_saving_writes_png_and_svg_that_are_the_same_each_time(tmp_path):
    def content(figures):
        return [file.read_bytes() for file in style.save(figures["speedup"], tmp_path / "a" / "speed-1.5")]

    (tmp_path / "a").mkdir()
    run = make_run(grid(["naive", "dynamic"], [32, 128]))
    before = dict(mpl.rcParams)
    first, second = content(figures_of(run)), content(figures_of(run))
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["speed-1.5.png", "speed-1.5.svg"]
    assert first == second
    assert first[0].startswith(b"\x89PNG")
    assert b"<svg" in first[1]
    assert b"<dc:date>" not in first[1]
    assert dict(mpl.rcParams) == before


def test_the_big_markers_of_the_steps_are_the_figures_of_the_table():
    """Not the median of the steps: a slow first step is part of a TPOT, and the order of strategies is the table's."""

    def ms(case, step):
        return 30.0 if step == 1 and case.strategy == "static" else 1.0 if case.strategy == "static" else 2.0

    run = make_run(grid(["dynamic", "static"], [32, 512], n_gen=16), ms=ms, turn_noise=0, step_noise=0)
    (axes,) = figures_of(run)["step_latency"].axes
    rows = summary.summarize(Tidy.of(run)).query("phase == 'decode'")
    marked = [
        list(line.get_ydata()) for line in axes.lines if line.get_marker() in {"s", "^"} and len(line.get_xdata())
    ]
    for strategy, heights in zip(["dynamic", "static"], marked, strict=True):
        assert heights == pytest.approx(rows.loc[rows["strategy"] == strategy, "latency_ms"].to_list())
    assert max(marked[0]) < min(marked[1])  # dynamic has the smaller TPOT, though most steps of static are faster


def test_the_curve_of_naive_goes_through_its_markers():
    def ms(case, step):
        tokens = (case.n_prompt + step) / 1000
        return 10 + 500 * tokens + 700 * tokens**2 if case.strategy == "naive" else 40.0

    figure = figures_of(make_run(grid(["naive", "dynamic"], [32, 512, 2048]), ms=ms))["step_latency"]
    lines = [line for line in figure.axes[0].lines if line.get_color() == style.styles(["naive"])["naive"].color]
    (curve,) = [line for line in lines if line.get_marker() == "" and len(line.get_xdata()) == 100]
    (marks,) = [line for line in lines if line.get_marker() == "o" and len(line.get_xdata()) == 3]
    for x, y in zip(marks.get_xdata(), marks.get_ydata(), strict=True):
        assert float(np.interp(x, curve.get_xdata(), curve.get_ydata())) == pytest.approx(y, rel=0.05)
    assert legend(figure)[0].endswith(" at 2,064")


def test_no_interval_of_a_comparison_is_cut_and_each_strategy_has_panels_of_its_own():
    figure = comparison_of(grid(USUAL, [32, 2048]))["overlay"]
    assert [axes.get_title() for axes in figure.axes[: len(USUAL)]] == USUAL
    assert len(figure.axes) == 2 * len(USUAL)
    figure.canvas.draw()
    for axes in figure.axes:
        low, high = axes.get_ylim()
        ends = [y for drawn in axes.collections for segment in drawn.get_segments() for y in segment[:, 1]]
        assert ends
        assert low <= min(ends)
        assert max(ends) <= high


def test_one_prompt_length_has_a_bar_per_strategy_and_no_axis_with_one_tick():
    drawn = figures_of(RUNS["one context"]())
    for name, strategies in (("throughput", ALL), ("speedup", ALL[1:])):
        for axes in drawn[name].axes:
            assert ticks(axes.yaxis) == strategies
            assert len(axes.patches) == len(strategies)
            assert "prompt 128" in axes.get_xlabel()


def test_what_plots_leave_out_is_named_for_every_model():
    firsts = {"a": ("float32", "bfloat16"), "b": ("bfloat16", "float32")}
    cases = [
        case
        for model, dtypes in firsts.items()
        for dtype in dtypes
        for case in grid(USUAL, [128], model=model, dtype=dtype)
    ]
    line = representative_line(summary.summarize(Tidy.of(make_run(cases))))
    assert "draw dtype float32 or bfloat16 (each model's first) alone; " in line
    line = representative_line(summary.summarize(Tidy.of(make_run([case for case in cases if case.model == "a"]))))
    assert "draw dtype float32 alone; the values are compared in plots/across-dtype*" in line


def test_a_run_of_many_lengths_is_drawn_at_some_of_them_and_says_so():
    cases = grid(["naive", "dynamic"], range(8, 8 + 8 * 50, 8), n_gen=4)
    made = summary.summarize(Tidy.of(make_run(cases, rounds=1)))
    assert limits_line(made) == "The plots draw at most 40 of 50 context lengths, evenly spread; the tables have all.\n"
    drawn = figures_of(make_run(cases, rounds=1, roofs=steady_roofs))
    assert len(legend(drawn["ladder"])) <= MOST_LINES
    curve = drawn["throughput"].axes[1].lines[0]
    assert len(curve.get_xdata()) <= MOST_CONTEXTS
    assert min(few_contexts(made, ["strategy"])["n_prompt"]) == 8
    assert max(few_contexts(made, ["strategy"])["n_prompt"]) == 400
    assert limits_line(made[made["n_prompt"] < 80]) == ""


def test_of_many_settings_some_are_drawn():
    cases = [case for threads in range(1, 25) for case in grid(["dynamic"], [8], n_gen=4, n_threads=threads)]
    run = make_run(cases, rounds=1)
    made = summary.summarize(Tidy.of(run))
    assert limits_line(made).startswith(f"The plots draw {MOST_PLOTS} of 24 settings, evenly")
    names = [name for name in figures_of(run) if name.startswith("throughput")]
    assert len(names) == MOST_PLOTS
    assert {"throughput-t1", "throughput-t24"} <= set(names)


def test_a_comparison_of_many_cases_draws_what_differs_most():
    figure = comparison_of(grid(["dynamic"], range(8, 8 + 8 * 40, 8), n_gen=4), rounds=2)["forest"]
    assert len(ticks(figure.axes[0].yaxis)) == MOST_CASES
    assert f"\nthe {MOST_CASES} of 80 rows that differ most" in figure.get_suptitle()
    assert cases_line(80) == "The plots draw at most 60 of 80 cases and phases; the table has all.\n"
    assert cases_line(MOST_CASES) == ""


def test_two_dollars_in_a_name_are_no_formula():
    cases = [case for model in ("./$\\a{$", "b") for case in grid(USUAL, [128, 512], model=model, n_gen=8)]
    for figure in figures_of(make_run(cases)).values():
        figure.canvas.draw()


def test_dtypes_and_batches_stand_side_by_side():
    cases = [
        case
        for dtype in ("float32", "bfloat16")
        for batch in (1, 4, 8)
        for case in grid(USUAL, [128, 512], dtype=dtype, batch_size=batch, n_gen=8)
    ]
    drawn = figures_of(make_run(cases))
    over_lengths = {"step_latency", "throughput", "speedup"}
    assert set(drawn) == {"across-batch", "across-dtype"} | over_lengths  # the latter for float32 and batch 1
    for name in over_lengths:
        assert "float32, cpu, 2 threads, sdpa, batch 1" in drawn[name].get_suptitle()
    batches, dtypes = drawn["across-batch"], drawn["across-dtype"]
    assert [axes.get_title() for axes in batches.axes] == [
        f"{phase}, dtype {dtype}" for dtype in ("float32", "bfloat16") for phase in ("prefill", "decode")
    ]
    assert ticks(batches.axes[-1].xaxis) == ["1", "4", "8"]
    assert ticks(dtypes.axes[-1].xaxis) == ["float32", "bfloat16"]
    assert len(dtypes.axes) == 6
    for figure in (batches, dtypes):
        assert "prompt 512" in figure.get_suptitle()
        assert legend(figure) == USUAL
        assert_readable(figure)
