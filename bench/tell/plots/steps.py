"""Frames -> figures of a run: latency of each step, throughput, speed-up. Pure functions; `style.save` writes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bench.analysis.slopes import latency_at
from bench.manifest import ELSEWHERE
from bench.naming import context
from bench.tell.drawn import MOST_DOTS, few
from bench.tell.plots import style as drawing
from bench.tell.words import EXTENT, SETTING_COLUMNS, by_setting, missing, number, with_interval
from kvcache.strategies.catalogue import REFEEDING

POSITION = "position (tokens before the new one)"
CONTEXT = "context length (tokens)"


def file_suffix(rows: pd.DataFrame, all_rows: pd.DataFrame, columns: list[str]) -> str:
    """Name what these rows have and others of the run have not, for a file: `-bfloat16-b4`; empty if nothing."""
    short = {"n_threads": "t", "batch_size": "b", "n_prompt": "p", "n_gen": "n", "n_depth": "d"}
    return "".join(
        f"-{short.get(column, '')}{_for_a_file(rows[column].iloc[0], all_rows[column])}"
        for column in columns
        if len(set(all_rows[column])) > len(set(rows[column])) == 1
    )


def _for_a_file(value: Any, values: Iterable[Any]) -> str:
    """Write a value for a file's name, numbered where another of `values` would be written the same: a/b and a_b."""
    written = {str(each): re.sub(r"[^A-Za-z0-9._-]", "_", str(each)) for each in values}
    alike = [each for each, text in written.items() if text == written[str(value)]]
    return written[str(value)] + (f"-{alike.index(str(value)) + 1}" if len(alike) > 1 else "")


def intervals(low: pd.Series[float], verdicts: Iterable[str] = ()) -> str:
    """Say in a title what becomes of the intervals, given their lower ends: they are drawn, or why they are not.

    `verdicts` are those of the comparison that they belong to.
    """
    if low.notna().any():
        return "with 95 % intervals"
    return f"without intervals ({ELSEWHERE})" if ELSEWHERE in set(verdicts) else "(too few rounds for intervals)"


def step_latency(steps: pd.DataFrame, slopes: pd.DataFrame, summary: pd.DataFrame) -> Figure:
    """Draw the latency of each decode step against its position; the legend has the fitted slopes.

    Small dots are the steps (median over the rounds), big markers the table's TPOT of each context length, at its
    middle step, with its interval; the fitted curve is raised to go through them, since a slow first step is part of a
    TPOT and not of a slope. `steps` are of one setting; of `slopes` and `summary` the rows of that setting are drawn.
    Where naive and cached strategies are both there, the left panel shows all of them, both axes logarithmic, and the
    right one the cached alone, from zero and straight, so that their slopes can be seen.
    """
    setting, steps = next(by_setting(steps))
    here = steps[SETTING_COLUMNS].drop_duplicates()
    slopes = slopes.merge(here, on=SETTING_COLUMNS)
    decode = summary[summary["phase"] == "decode"].merge(here, on=SETTING_COLUMNS)
    # A token's decode has n_gen - 1 steps, from position n_depth + n_prompt + 1 on.
    decode = decode.assign(position=decode["n_depth"] + decode["n_prompt"] + decode["n_gen"] / 2)
    medians = steps.groupby(["strategy", "position"], sort=False)["latency_ms"].median().reset_index()
    cached = medians[~medians["strategy"].isin(REFEEDING)]
    with_naive = len(cached) < len(medians)
    shown = ([medians] if with_naive else []) + ([cached] if len(cached) else [])
    title = f"Latency of each decode step; big markers: TPOT as in the table, {intervals(decode['latency_ms_low'])}"
    figure = drawing.make_figure(title, setting, 4.6)
    for panel, points in enumerate(shown):
        axes = figure.add_subplot(1, len(shown), panel + 1)
        drawn = decode[decode["strategy"].isin(points["strategy"])]
        for strategy, style in drawing.styles(medians["strategy"]).items():
            own, table, slope = (frame[frame["strategy"] == strategy] for frame in (points, drawn, slopes))
            _step_curve(axes, own, table, slope, style)
        heights = [*points["latency_ms"], *drawn["latency_ms"], *drawn["latency_ms_high"].dropna()]
        drawing.value_axis(axes, heights, "latency of one step (ms)", from_zero=points is cached)
        if points is cached:
            drawing.linear_axis(axes, points["position"].max(), POSITION)
            axes.set_title("cached strategies (from zero)", fontsize=10)
        else:
            drawing.context_axis(axes, decode["n_depth"] + decode["n_prompt"], POSITION, reach=points["position"])
            axes.set_title("all strategies", fontsize=10)
    fitted = slopes[slopes["slope_ms_per_1000_tokens"].notna()]
    title = "slope in ms per 1,000 tokens" + (" [95 % interval]" if fitted["slope_low"].notna().any() else "")
    drawing.legend_below(figure, figure.axes[0], columns=2, title=None if fitted.empty else title)
    return figure


def throughput(summary: pd.DataFrame) -> Figure:
    """Draw tokens per second of prefill and of decode against context length; `summary` are rows of one setting."""
    setting, _ = next(by_setting(summary, also=EXTENT))
    figure = drawing.make_figure(f"Throughput, median {intervals(summary['latency_ms_low'])}", setting, 4.2)
    scale = summary["tokens_per_s"] * summary["latency_ms"]  # tokens per second = scale / latency
    summary = summary.assign(low=scale / summary["latency_ms_high"], high=scale / summary["latency_ms_low"])
    for _, _, axes, rows in drawing.panels(figure, summary):
        _curves(axes, rows, "tokens_per_s", "low", "high", "throughput (tokens/s)")
    _legend(figure)
    return figure


def speedup(summary: pd.DataFrame) -> Figure:
    """Draw time of naive / time of a strategy, for prefill and decode, against context length; one setting."""
    setting, _ = next(by_setting(summary, also=EXTENT))
    others = summary[~summary["strategy"].isin(REFEEDING) & summary["speedup_vs_naive"].notna()]
    figure = drawing.make_figure(f"Speed-up over naive re-feed {intervals(others['speedup_low'])}", setting, 4.2)
    for _, _, axes, rows in drawing.panels(figure, others):
        _curves(axes, rows, "speedup_vs_naive", "speedup_low", "speedup_high", "speed-up (times)", guide=1.0)
    _legend(figure)
    return figure


def _step_curve(
    axes: Axes, points: pd.DataFrame, table: pd.DataFrame, slope: pd.DataFrame, style: drawing.Style
) -> None:
    """Draw a dot per step of one strategy, a marker per row of the table, and the fitted curve through the markers."""
    if points.empty:
        return
    marks = {**style.curve, "linestyle": "none"}
    dots = points.iloc[few(range(len(points)), MOST_DOTS)]
    axes.plot(dots["position"], dots["latency_ms"], ".", color=style.color, markersize=3)
    axes.plot(table["position"], table["latency_ms"], **marks)
    axes.vlines(table["position"], table["latency_ms_low"], table["latency_ms_high"], color=style.color, linewidth=1.6)
    label = str(points["strategy"].iloc[0])
    if slope["slope_ms_per_1000_tokens"].isna().all():
        axes.plot([], [], label=label, **marks)
        return
    fit = slope.iloc[0]
    above = table["latency_ms"].to_numpy() / latency_at(fit, table["position"].to_numpy(dtype=np.float64))
    position = np.geomspace(fit["first_position"], fit["last_position"], 100)
    axes.plot(position, latency_at(fit, position) * np.median(above), **{**style.curve, "marker": ""})
    label += f"  {with_interval(fit['slope_ms_per_1000_tokens'], fit['slope_low'], fit['slope_high'])}"
    label += "" if missing(fit["slope_at"]) else f" at {fit['slope_at']:,}"
    axes.plot([], [], label=label, **style.curve)


def _curves(
    axes: Axes, rows: pd.DataFrame, value: str, low: str, high: str, label: str, guide: float | None = None
) -> None:
    """Draw a line per strategy over the context lengths, with its intervals; bars where there is one length alone."""
    if len(set(rows["n_prompt"])) == 1:
        _bars(axes, rows, value, low, high, label, guide)
        return
    if guide is not None:
        axes.axhline(guide, color=drawing.GUIDE, linewidth=1.2, zorder=1, label="naive = 1")
    all_styles = drawing.styles(rows["strategy"])
    for place, (strategy, style) in enumerate(all_styles.items()):
        own = rows[rows["strategy"] == strategy].sort_values("n_prompt")
        x = drawing.shifted(own["n_depth"] + own["n_prompt"], place, len(all_styles))
        axes.plot(x, own[value], label=strategy, **style.curve)
        axes.vlines(x, own[low], own[high], color=style.color, linewidth=1.6)
    drawing.context_axis(axes, rows["n_depth"] + rows["n_prompt"], CONTEXT)
    around = [] if guide is None else [0.8 * guide, 1.25 * guide]
    drawing.value_axis(axes, [*around, *rows[value], *rows[high]], label)


def _bars(
    axes: Axes, rows: pd.DataFrame, value: str, low: str, high: str, label: str, guide: float | None = None
) -> None:
    """Draw a bar per strategy from zero, the value beside it, and its interval."""
    names, reach = list(rows["strategy"]), max([*rows[value], *rows[high].dropna()])
    for place, row in enumerate(rows.to_dict("records")):
        color = drawing.styles(names)[row["strategy"]].color
        axes.barh(place, row[value], color=color, height=0.6)
        if not missing(row[low]):
            axes.hlines(place, row[low], row[high], color="#222222", linewidth=1.4)
        right = row[value] if missing(row[high]) else row[high]
        axes.annotate(number(row[value]), (right, place), (4, 0), textcoords="offset points", va="center", fontsize=9)
    if guide is not None:
        axes.axvline(guide, color=drawing.GUIDE, linewidth=1.2, label="naive = 1")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 1.25 * reach)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(drawing.THOUSANDS)
    axes.set_xlabel(f"{label}, prompt {context(rows.iloc[0].to_dict())}")
    drawing.open_frame(axes, "x")


def _legend(figure: Figure) -> None:
    if figure.axes[0].get_legend_handles_labels()[1]:
        drawing.legend_below(figure, figure.axes[0], columns=5)
