"""Frames -> figures of a run: latency of each step, throughput, speed-up. Pure functions; `plot_style.save` writes."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.tell.plots.style import (
    GUIDE,
    Style,
    context_axis,
    legend_below,
    linear_axis,
    make_figure,
    shifted,
    styles,
    value_axis,
)
from bench.tell.words import SETTING_COLUMNS, by_setting, with_interval
from kvcache.strategies.catalogue import REFEEDING

POSITION = "position (tokens before the new one)"
CONTEXT = "context length (tokens)"
EXTENT = ["n_gen", "n_depth"]
PLOT_COLUMNS = [*SETTING_COLUMNS, *EXTENT]
"""What the points of a plot against context length have in common."""


def figures(summary: pd.DataFrame, steps: pd.DataFrame, slopes: pd.DataFrame) -> dict[str, Figure]:
    """Every plot of a run by file name (without suffix): one of each kind for each setting that the run has.

    `summary` as `summarize`, `steps` as `Tidy.steps`, `slopes` as `slopes.slopes` make them. A setting
    without the times that a plot shows has no such plot.
    """
    drawn: dict[str, Figure] = {}
    timed = summary[summary["latency_ms"].notna()]
    for _, rows in by_setting(steps):
        drawn["step_latency" + file_suffix(rows, steps, SETTING_COLUMNS)] = step_latency(rows, slopes)
    for _, rows in by_setting(timed, also=EXTENT):
        drawn["throughput" + file_suffix(rows, timed, PLOT_COLUMNS)] = throughput(rows)
        if (rows["speedup_vs_naive"].notna() & ~rows["strategy"].isin(REFEEDING)).any():
            drawn["speedup" + file_suffix(rows, timed, PLOT_COLUMNS)] = speedup(rows)
    return drawn


def file_suffix(rows: pd.DataFrame, all_rows: pd.DataFrame, columns: list[str]) -> str:
    """What tells these rows from the others of the run, for a file name: `-bfloat16-b4`; nothing if there are none."""
    short = {"n_threads": "t", "batch_size": "b", "n_gen": "n", "n_depth": "d"}
    parts = [
        f"-{short.get(column, '')}{rows[column].iloc[0]}"
        for column in columns
        if len(set(all_rows[column])) > len(set(rows[column])) == 1
    ]
    return re.sub(r"[^A-Za-z0-9._-]", "_", "".join(parts))


def intervals(low: pd.Series[float]) -> str:
    """What a title says of the intervals, given their lower ends: that they are drawn, or why they are not."""
    return "with 95 % intervals" if low.notna().any() else "(too few rounds for intervals)"


def shown_phases(rows: pd.DataFrame) -> list[str]:
    """The phases that get a panel: with n_gen = 1 there is no decode."""
    return [phase for phase in ("prefill", "decode") if (rows["phase"] == phase).any()]


def step_latency(steps: pd.DataFrame, slopes: pd.DataFrame) -> Figure:
    """Latency of each decode step (median over the rounds) against its position; the legend has the fitted slopes.

    `steps` are of one setting; of `slopes` the rows of that setting are drawn. Where naive and cached strategies are
    both there, the left panel shows all of them, both axes logarithmic, and the right one the cached alone, from zero
    and straight, so that their slopes can be seen.
    """
    setting, steps = next(by_setting(steps))
    slopes = slopes.merge(steps[SETTING_COLUMNS].drop_duplicates(), on=SETTING_COLUMNS)
    steps = steps.assign(context=steps["n_depth"] + steps["n_prompt"])
    medians = steps.groupby(["strategy", "context", "position"], sort=False)["latency_ms"].median().reset_index()
    cached = medians[~medians["strategy"].isin(REFEEDING)]
    with_naive = len(cached) < len(medians)
    panels = ([medians] if with_naive else []) + ([cached] if len(cached) else [])
    figure = make_figure("Latency of each decode step, median over the rounds", setting, 4.6)
    for number, points in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), number + 1)
        for strategy, style in styles(medians["strategy"]).items():
            _step_curve(axes, points[points["strategy"] == strategy], slopes[slopes["strategy"] == strategy], style)
        value_axis(axes, points["latency_ms"], "latency of one step (ms)", from_zero=points is cached)
        if points is cached:
            linear_axis(axes, points["position"], POSITION)
            axes.set_title("cached strategies (from zero)", fontsize=10)
        else:
            context_axis(axes, points["context"], POSITION)
            axes.set_title("all strategies", fontsize=10)
    fitted = slopes[slopes["slope_ms_per_1000_tokens"].notna()]
    told = "slope in ms per 1,000 tokens" + (" [95 % interval]" if fitted["slope_low"].notna().any() else "")
    legend_below(figure, figure.axes[0], columns=2, title=None if fitted.empty else told)
    return figure


def throughput(summary: pd.DataFrame) -> Figure:
    """Tokens per second of prefill and of decode against context length; `summary` are rows of one setting."""
    setting, _ = next(by_setting(summary, also=EXTENT))
    figure = make_figure(f"Throughput, median {intervals(summary['latency_ms_low'])}", setting, 4.2)
    phases = shown_phases(summary)
    for number, phase in enumerate(phases):
        rows = summary[summary["phase"] == phase]
        scale = rows["tokens_per_s"] * rows["latency_ms"]  # tokens per second = scale / latency
        rows = rows.assign(low=scale / rows["latency_ms_high"], high=scale / rows["latency_ms_low"])
        axes = figure.add_subplot(1, len(phases), number + 1)
        _curves(axes, rows, "tokens_per_s", "low", "high")
        value_axis(axes, [*rows["tokens_per_s"], *rows["high"]], "throughput (tokens/s)")
        axes.set_title(phase, fontsize=10)
    legend_below(figure, figure.axes[0], columns=5)
    return figure


def speedup(summary: pd.DataFrame) -> Figure:
    """Time of naive / time of a strategy, for prefill and decode, against context length; one setting."""
    setting, _ = next(by_setting(summary, also=EXTENT))
    others = summary[~summary["strategy"].isin(REFEEDING) & summary["speedup_vs_naive"].notna()]
    figure = make_figure(f"Speed-up over naive re-feed {intervals(others['speedup_low'])}", setting, 4.2)
    phases = shown_phases(others)
    for number, phase in enumerate(phases):
        rows = others[others["phase"] == phase]
        axes = figure.add_subplot(1, len(phases), number + 1)
        axes.axhline(1, color=GUIDE, linewidth=1.2, zorder=1, label="naive = 1")
        _curves(axes, rows, "speedup_vs_naive", "speedup_low", "speedup_high")
        value_axis(axes, [0.8, 1.25, *rows["speedup_vs_naive"], *rows["speedup_high"]], "speed-up (times)")
        axes.set_title(phase, fontsize=10)
    legend_below(figure, figure.axes[0], columns=5)
    return figure


def _step_curve(axes: Axes, points: pd.DataFrame, slope: pd.DataFrame, style: Style) -> None:
    """A dot per step of one strategy, a marker on the median of each context length, and the fitted line."""
    if points.empty:
        return
    marks = {**style.curve, "linestyle": "none"}
    medians = points.groupby("context")[["position", "latency_ms"]].median()
    axes.plot(points["position"], points["latency_ms"], ".", color=style.color, markersize=3)
    axes.plot(medians["position"], medians["latency_ms"], **marks)
    label = str(points["strategy"].iloc[0])
    if slope["slope_ms_per_1000_tokens"].isna().all():
        axes.plot([], [], label=label, **marks)
        return
    fit = slope.iloc[0]
    position = np.geomspace(fit["first_position"], fit["last_position"], 100)
    line = fit["intercept_ms"] + fit["slope_ms_per_1000_tokens"] * position / 1000
    axes.plot(position, line, **{**style.curve, "marker": ""})
    label += f"  {with_interval(fit['slope_ms_per_1000_tokens'], fit['slope_low'], fit['slope_high'])}"
    axes.plot([], [], label=label, **style.curve)


def _curves(axes: Axes, rows: pd.DataFrame, value: str, low: str, high: str) -> None:
    """A line per strategy over the context lengths, with its intervals."""
    all_styles = styles(rows["strategy"])
    for place, (strategy, style) in enumerate(all_styles.items()):
        own = rows[rows["strategy"] == strategy].sort_values("n_prompt")
        x = shifted(own["n_depth"] + own["n_prompt"], place, len(all_styles))
        axes.plot(x, own[value], label=strategy, **style.curve)
        axes.vlines(x, own[low], own[high], color=style.color, linewidth=1.6)
    context_axis(axes, rows["n_depth"] + rows["n_prompt"], CONTEXT)
