import functools
import re
import warnings

import msgspec
import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from bench.analysis.agreement import agreement
from bench.analysis.crossings import crossing
from bench.analysis.summary import summarize
from bench.analysis.tidy import Tidy
from bench.tell.plots import caches
from bench.tell.plots.over_context import pays
from bench.tell.plots.trade import pareto, trade
from tests.handmade import LOST, grid, make_run, run_with_lossy_kinds, smollm2_plan
from tests.tell.test_plots import assert_readable, legend, ticks

_FRONT = ["quanto-int2", "compiled-int4", "compiled-int8"]
EAGER = {"dynamic": (1.0, 0.0), "fp8": (0.26, 1e-4), "quanto-int4": (0.19, 8e-4), "quanto-int2": (0.13, 2.6)}
COMPILED = {"compiled": (1.0, 0.0), "compiled-int8": (0.26, 1e-5), "compiled-int4": (0.16, 1e-2)}
KINDS = EAGER | COMPILED
"""Bytes as a share of the exact cache's, and KL in nats."""


def ms(case, step):
    """fp8 never pays, quanto-int4 from 1,500 tokens on, compiled-int8 always, compiled-int4 up to 1,000."""
    tokens = case.n_depth + case.n_prompt
    base = 20 if case.strategy.startswith("compiled") else 40
    exact = base + 0.01 * tokens
    return exact + {
        "fp8": 20 + 0.01 * tokens,
        "quanto-int4": 0.005 * (1500 - tokens),
        "quanto-int2": 30,
        "compiled-int8": -3,
        "compiled-int4": 0.005 * (tokens - 1000),
    }.get(case.strategy, 0)


def cache_run(depths=(512, 2048), kinds=KINDS, **arguments):
    """A run of kinds of cache whose bytes, quality and speed are known."""
    cases = [case for depth in depths for case in grid(kinds, [1], n_depth=depth, n_gen=16)]
    run = make_run(cases, ms=ms, plan=smollm2_plan, **arguments)
    by_key = {case.key: case for case in cases}
    checks, random = [], np.random.default_rng(1)
    for check in run.checks:
        case = by_key[check.case]
        share, kl = KINDS.get(case.strategy, (0.5, 0.1))
        held = round(share * 46_080 * (case.n_depth + 16))
        agreed = (random.random(128) < 1 - min(0.9, kl**0.5)).astype(float).tolist()
        lost = msgspec.structs.replace(LOST, logit_kl=kl, positions=128, agreement_by_position=agreed)
        checks.append(
            msgspec.structs.replace(
                check,
                exact=not kl,
                quality=lost if kl else None,
                kv_bytes_allocated_after_prefill=held,
                kv_bytes_allocated_after_decode=held,
            )
        )
    plan = [
        msgspec.structs.replace(
            item,
            kv_bytes_allocated={
                phase: round(KINDS[item.case.strategy][0] * 46_080 * (item.case.n_depth + 16))
                for phase in ("prefill", "decode")
            },
        )
        if item.case.strategy in KINDS
        else item
        for item in run.manifest.plan
    ]
    return msgspec.structs.replace(run, checks=checks, manifest=msgspec.structs.replace(run.manifest, plan=plan))


def figures_of(run):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        groups = caches.groups(summarize(Tidy.of(run)), agreement(run))
        return {name: draw() for listed in groups for name, draw in listed().items()}


@functools.cache  # not when the module is imported, which every process of pytest-xdist does
def usual_run():
    return cache_run()


@functools.cache
def usual_figures():
    return figures_of(usual_run())


def test_every_plot_of_caches_is_drawn_and_readable():
    assert sorted(usual_figures()) == ["agreement", "kv-bytes", "tpot-context", "trade-d2048", "trade-d512"]
    for figure in usual_figures().values():
        assert_readable(figure)


RUNS = {
    "fifteen kinds": lambda: cache_run(
        kinds=[*KINDS, "cache:mine:make", "static", "hqq-int8", "hqq-int4", "sink-window", "hqq-int2"]
    ),
    "four depths": lambda: cache_run(depths=(100, 512, 2048, 7936), rounds=3),
    "one depth": lambda: cache_run(depths=(512,), kinds=["dynamic", "cache:my.own.package:a_factory_with_a_long_name"]),
    "prompts": run_with_lossy_kinds,
}


@pytest.mark.parametrize("name", RUNS)
def test_no_text_is_hidden_or_cut_off(name):
    for figure in figures_of(RUNS[name]()).values():
        assert_readable(figure)


def test_a_run_of_exact_caches_alone_has_none_of_these_plots():
    assert figures_of(make_run(grid(["naive", "dynamic", "static"], [32, 128]))) == {}


def test_the_trade_marks_exact_kinds_and_draws_the_front():
    axes, bar = usual_figures()["trade-d512"].axes
    (exact,) = [line for line in axes.lines if line.get_label() == "exact"]
    assert len(exact.get_xdata()) == 2
    assert exact.get_xdata() == pytest.approx([46_080 * 528 / 528] * 2)
    (lossy,) = [drawn for drawn in axes.collections if drawn.get_label() == "lossy"]
    assert list(lossy.get_array()) == [kl for _, kl in KINDS.values() if kl]
    assert {text.get_text() for text in axes.texts} >= set(KINDS)
    assert bar.get_ylabel() == "logit KL (nats), log scale"
    front = next(line for line in axes.lines if line.get_drawstyle() == "steps-post")
    # quanto-int2 is the smallest, compiled-int4 little larger and much faster, compiled-int8 the fastest.
    assert front.get_xdata() == pytest.approx([46_080 * KINDS[name][0] for name in _FRONT], rel=1e-3)


def test_a_kind_that_was_not_judged_is_drawn_grey_and_said_to_be():
    decode = summarize(Tidy.of(cache_run(depths=(512,)))).query("phase == 'decode'")
    for unjudged in (["fp8"], [name for name, (_, kl) in KINDS.items() if kl]):
        figure = trade(decode.assign(logit_kl=decode["logit_kl"].mask(decode["strategy"].isin(unjudged))))
        axes = figure.axes[0]
        (grey,) = [line for line in axes.lines if line.get_label() == "lossy, not judged"]
        assert len(grey.get_xdata()) == len(unjudged)
        assert "lossy, not judged" in legend(figure)
        coloured = sum(len(drawn.get_offsets()) for drawn in axes.collections if drawn.get_label() == "lossy")
        assert coloured == sum(kl > 0 for _, kl in KINDS.values()) - len(unjudged)
        assert_readable(figure)


def test_a_prefill_over_quantized_keys_is_in_every_title():
    run = cache_run(kinds=["dynamic", "fp8", "compiled", "compiled-int8"])
    summary, positions = summarize(Tidy.of(run)), agreement(run)
    for as_stored in (False, True):
        frames = (
            rows.assign(prefill_quantized=as_stored & rows["strategy"].eq("compiled-int8"))
            for rows in (summary, positions)
        )
        found = [draw() for listed in caches.groups(*frames) for draw in listed().values()]
        assert len(found) == 5
        for figure in found:
            assert any("prefill quantized" in text.get_text() for text in figure.findobj(Text)) == as_stored


def test_the_front_holds_what_no_other_beats_in_both():
    rows = pd.DataFrame({"x": [1.0, 2.0, 3.0, 2.0, 4.0], "y": [5.0, 4.0, 4.0, 6.0, 1.0], "name": list("abcde")})
    assert list(pareto(rows)["name"]) == ["a", "b", "e"]


def test_the_crossing_is_stated_for_each_kind():
    labels = dict(" ".join(label.split()).split(": ", 1) for label in legend(usual_figures()["tpot-context"]))
    assert labels["dynamic"] == labels["compiled"] == "what the others are compared with"
    assert labels["fp8"].startswith("pays at no measured context; 1.6")
    crossed = re.match(r"pays from 1,(\d+) \[1,(\d+) to 1,(\d+)\] tokens", labels["quanto-int4"])
    assert crossed
    low, at, high = (int(crossed[group]) for group in (2, 1, 3))
    assert low < at < high
    assert 400 < at < 600
    assert labels["compiled-int8"].startswith("pays at every measured context; 0.9")
    assert labels["compiled-int4"].startswith("pays only up to ")


def rows_of(*ratios):
    return pd.DataFrame(
        [
            {
                "latency_ms": 10.0 * middle,
                "latency_vs_exact": middle,
                "latency_vs_exact_low": low,
                "latency_vs_exact_high": high,
            }
            for low, middle, high in ratios
        ]
    )


def test_a_crossing_is_interpolated_in_the_difference_of_the_times():
    found = crossing([100, 200], rows_of((1.1, 1.2, 1.3), (0.8, 0.9, 0.95)))
    assert found.faster_beyond
    assert found.tokens == pytest.approx(100 + 100 * 2 / 3)
    assert found.low == pytest.approx(100 + 100 * 1 / 3)
    assert found.high == pytest.approx(100 + 100 * 3 / 3.5)


def test_the_end_of_an_interval_that_lies_outside_is_open():
    found = crossing([100, 200], rows_of((0.99, 1.1, 1.2), (0.8, 0.95, 1.02)))
    assert (found.low, found.high) == (None, None)
    assert found.tokens is not None


def test_a_kind_that_begins_faster_and_ends_slower():
    found = crossing([100, 200, 400], rows_of((0.7, 0.8, 0.9), (0.8, 0.9, 0.95), (1.05, 1.1, 1.2)))
    assert not found.faster_beyond
    assert 200 < found.low < found.tokens < found.high < 400


def test_without_intervals_and_without_a_crossing():
    nan = float("nan")
    assert crossing([1, 2], rows_of((nan, 1.2, nan), (nan, 1.1, nan))).tokens is None
    found = crossing([1, 2], rows_of((nan, 1.2, nan), (nan, 0.9, nan)))
    assert (found.low, found.high) == (None, None)
    assert 1 < found.tokens < 2
    assert crossing([1], rows_of((0.7, 0.8, 0.9))).faster_beyond


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        (((0.5, 0.7, 0.9), (0.8, 1.1, 1.3)), "pays at 512, no difference found elsewhere; 1.1"),
        (((0.5, 0.7, 0.9), (0.6, 0.8, 1.1)), "pays at 512, no difference found elsewhere; 0.8"),
        (((0.8, 1.1, 1.3), (1.1, 1.2, 1.3)), "slower at 2,048, no difference found elsewhere; 1.2"),
        (((0.5, 0.7, 0.9), (0.6, 0.8, 0.9)), "pays at every measured context; 0.8"),
        (((1.1, 1.2, 1.3), (1.1, 1.2, 1.3)), "pays at no measured context; 1.2"),
        (((0.8, 0.9, 1.3), (0.9, 1.0, 1.1)), "no difference found; 1.0"),
    ],
)
def test_a_kind_pays_only_where_its_interval_says_so(ratios, said):
    own = rows_of(*ratios).assign(strategy="fp8", context=[512, 2048])
    assert pays(own).startswith(said)


def test_agreement_has_a_panel_for_each_lossy_kind_and_the_mean_of_sixteen_steps():
    lossy = [name for name, (_, kl) in KINDS.items() if kl]
    panels = [axes for axes in usual_figures()["agreement"].axes if axes.get_title()]
    assert [axes.get_title().split("\n")[0] for axes in panels] == lossy
    quality = {check.case: check.quality for check in usual_run().checks if check.quality}
    first = next(plan.case.key for plan in usual_run().manifest.plan if plan.case.strategy == "fp8")
    line = panels[0].lines[0]
    assert len(line.get_ydata()) == 8
    assert line.get_ydata()[0] == pytest.approx(np.mean(quality[first].agreement_by_position[:16]))
    assert legend(usual_figures()["agreement"]) == ["1 @ 512", "1 @ 2048"]


def test_bytes_are_lines_where_predicted_and_points_where_measured():
    figure = figures_of(cache_run(kinds=["dynamic", "fp8", "cache:mine:make"]))["kv-bytes"]
    (axes,) = figure.axes
    assert ticks(axes.xaxis)[0] == "2,049"
    points = [line for line in axes.lines if line.get_linestyle() == "None" and len(line.get_xdata())]
    assert list(points[0].get_ydata()) == [46_080 * 528, 46_080 * 2064]
    predicted = [line for line in axes.lines if line.get_marker() == "" and np.isfinite(line.get_ydata()).any()]
    assert len(predicted) == 2  # nothing is known of the user's own
