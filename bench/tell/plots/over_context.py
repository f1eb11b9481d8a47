"""Frames -> figures over the context length: the decode step and the bytes of every kind of cache."""

from __future__ import annotations

import itertools
import textwrap

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bench.analysis.crossings import Crossing, crossing
from bench.tell.plots.steps import CONTEXT, intervals
from bench.tell.plots.style import (
    context_axis,
    legend_below,
    make_figure,
    open_frame,
    styles,
    value_axis,
)
from bench.tell.words import by_setting, with_interval
from kvcache.strategies.catalogue import COMPILING, exact_of

LEGEND_COLUMNS = 108
"""Characters of the legend that fit the width."""

SPREAD = 1.2
"""Ratio of the outermost places of one context length, where many kinds stand side by side."""


def contexts_of(rows: pd.DataFrame) -> pd.Series[int]:
    """Count the tokens before each decode row's first step."""
    return rows["n_depth"] + rows["n_prompt"]


def tpot_context(rows: pd.DataFrame) -> Figure:
    """Draw TPOT against context, kinds that compile beside the others; the legend says from where on each pays.

    `rows` are the decode rows of one setting that have a time. Each panel has the exact kind that its others are
    compared with (`dynamic`, `compiled`), round by round.
    """
    words, _ = next(by_setting(rows, also=["n_gen"]))
    compiled = rows["strategy"].isin(COMPILING)
    halves = [(name, half) for name, half in (("eager", rows[~compiled]), ("compiled", rows[compiled])) if len(half)]
    title = f"TPOT against context, median {intervals(rows['latency_ms_low'])}; a kind pays where its step is faster"
    figure = make_figure(title, words, 4)
    looks = styles(rows["strategy"])
    for number, (title, half) in enumerate(halves):
        axes = figure.add_subplot(1, len(halves), number + 1)
        names = list(dict.fromkeys(half["strategy"]))
        for place, name in enumerate(names):
            own = half[half["strategy"] == name].assign(context=contexts_of).sort_values("context")
            x = _beside(own["context"], place, len(names))
            label = textwrap.fill(f"{name}: {pays(own)}", LEGEND_COLUMNS, subsequent_indent="    ")
            axes.plot(x, own["latency_ms"], label=label, **looks[name].curve)
            axes.vlines(x, own["latency_ms_low"], own["latency_ms_high"], color=looks[name].color, linewidth=1.6)
        context_axis(axes, contexts_of(half), CONTEXT)
        value_axis(axes, [*half["latency_ms"], *half["latency_ms_high"].dropna()], "TPOT (ms)")
        axes.set_title(title, fontsize=10)
    named = [axes.get_legend_handles_labels() for axes in figure.axes]
    handles, labels = (list(itertools.chain(*parts)) for parts in zip(*named, strict=True))
    figure.legend(handles, labels, loc="outside lower center", ncols=1, handlelength=3.5, frameon=False, fontsize=8.5)
    figure.set_figheight(4.2 + 0.19 * sum(label.count("\n") + 1 for label in labels))
    return figure


def pays(own: pd.DataFrame) -> str:
    """Say from which context on a strategy is faster than the exact one; `own` are its rows, by rising `context`."""
    exact = exact_of(own["strategy"].iloc[0])
    if own["strategy"].iloc[0] == exact:
        return "what the others are compared with"
    own = own[own["latency_vs_exact"].notna()]
    if own.empty:
        return f"not measured beside {exact}"
    contexts = list(own["context"])
    last = own.iloc[-1]
    ratio = with_interval(*(last[f"latency_vs_exact{end}"] for end in ("", "_low", "_high")))
    at_last = f"{ratio} of {exact}'s time at {contexts[-1]:,}"
    found = crossing(contexts, own)
    known = bool(own["latency_vs_exact_low"].notna().all())
    faster, slower = own["latency_vs_exact_high"] < 1, own["latency_vs_exact_low"] > 1
    if known and not (faster | slower).any():
        return f"no difference found; {at_last}"
    if known and not (faster | slower).all() and not (faster.any() and slower.any()):
        at = " and ".join(f"{tokens:,}" for tokens in own.loc[faster | slower, "context"])
        return f"{'pays' if faster.any() else 'slower'} at {at}, no difference found elsewhere; {at_last}"
    if found.tokens is None:
        return f"pays {'at every' if found.faster_beyond else 'at no'} measured context; {at_last}"
    span = f" {_span(found, contexts)}" if known else ""
    if found.faster_beyond:
        return f"pays from {found.tokens:,.0f}{span} tokens on; {at_last}"
    return f"pays only up to {found.tokens:,.0f}{span} tokens; {at_last}"


def _span(found: Crossing, contexts: list[int]) -> str:
    low = f"below {contexts[0]:,}" if found.low is None else f"{found.low:,.0f}"
    high = f"beyond {contexts[-1]:,}" if found.high is None else f"{found.high:,.0f}"
    return f"[{low} to {high}]"


def kv_bytes(rows: pd.DataFrame) -> Figure:
    """Draw the bytes that each kind holds at the end of decode against its tokens: lines predicted, points measured.

    `rows` are the decode rows of one setting; the user's own cache, of which nothing is predicted, has points alone.
    """
    words, _ = next(by_setting(rows, also=["n_gen"]))
    figure = make_figure("Bytes held by each cache: lines are predicted, points measured", words, 4.8)
    axes = figure.add_subplot()
    names = list(dict.fromkeys(rows["strategy"]))
    for name, look in styles(names).items():
        own = rows[rows["strategy"] == name].assign(context=contexts_of).sort_values("context")
        x = _beside(own["context"], names.index(name), len(names))
        axes.plot(x, own["kv_bytes_allocated_predicted"].astype("float64"), **{**look.curve, "marker": ""})
        axes.plot(x, own["kv_bytes_allocated"], **{**look.curve, "linestyle": "none"})
        axes.plot([], [], label=name, **look.curve)
    context_axis(axes, contexts_of(rows), CONTEXT)
    _bytes_axis(axes, rows)
    legend_below(figure, axes, columns=4)
    return figure


def _beside(contexts: pd.Series[int], place: int, places: int) -> pd.Series[float]:
    """Move context lengths aside by little, so that kinds of equal figures stand side by side."""
    return contexts.astype("float64").mul(SPREAD ** (place / max(1, places - 1) - 0.5))


def _bytes_axis(axes: Axes, rows: pd.DataFrame) -> None:
    """Make the y axis logarithmic, in MB as the tables are, from below the smallest cache to above the largest."""
    held = rows["kv_bytes_allocated"].astype("float64")
    low, high = held.min() / 1.5, held.max() * 1.5
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    ticks = [digit * 10.0**power for power in range(15) for digit in (1, 2, 5) if low <= digit * 10.0**power <= high]
    axes.yaxis.set_major_locator(FixedLocator(ticks[:: -(-len(ticks) // 8)]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e6:,.10g}"))
    axes.set_ylabel("MB allocated, log scale")
    open_frame(axes, "y")
