"""Frames -> figures of a run: latency of each step, throughput, speed-up. Pure functions; `plot_style.save` writes."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.labels import SETTING_COLUMNS, by_setting, with_interval
from bench.plot_style import (
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

POSITION = "position (tokens before the new one)"
CONTEXT = "context length (tokens)"
PHASES = ("prefill", "decode")
PLOT_COLUMNS = ["n_gen", "n_depth"]
"""Beside the setting: what the points of a plot against context length have in common."""


def figures(summary: pd.DataFrame, steps: pd.DataFrame, slopes: pd.DataFrame) -> dict[str, Figure]:
    """Every plot of a run by file name (without suffix): one of each kind for each setting that the run has.

    `summary` as `bench.summary.summarize`, `steps` as `bench.rounds.usable_steps`, `slopes` as `bench.slopes.slopes`
    make them. A setting without the times that a plot shows has no such plot.
    """
    drawn: dict[str, Figure] = {}
    timed = summary[summary["latency_ms"].notna()]
    for _, rows in by_setting(steps):
        drawn["step_latency" + _suffix(rows, steps)] = step_latency(rows, slopes)
    for _, rows in by_setting(timed, also=PLOT_COLUMNS):
        drawn["throughput" + _suffix(rows, timed)] = throughput(rows)
        if (rows["speedup_vs_naive"].notna() & (rows["strategy"] != "naive")).any():
            drawn["speedup" + _suffix(rows, timed)] = speedup(rows)
    return drawn


def step_latency(steps: pd.DataFrame, slopes: pd.DataFrame) -> Figure:
    """Latency of each decode step (median over the rounds) against its position; the legend has the fitted slopes.

    `steps` are of one setting; of `slopes` the rows of that setting are drawn. Where naive and cached strategies are
    both there, the left panel shows all of them, both axes logarithmic, and the right one the cached alone, from zero
    and straight, so that their slopes can be seen.
    """
    setting, steps = next(by_setting(steps))
    slopes = slopes.merge(steps[SETTING_COLUMNS].drop_duplicates(), on=SETTING_COLUMNS)
    medians = steps.groupby(["strategy", "position"], sort=False)["latency_ms"].median().reset_index()
    cached = medians[medians["strategy"] != "naive"]
    panels = [medians] if cached.empty or len(cached) == len(medians) else [medians, cached]
    figure = make_figure("Latency of each decode step, median over the rounds", setting, 4.6)
    for panel, points in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), panel + 1)
        for strategy, style in styles(medians["strategy"]).items():
            _step_curve(axes, points[points["strategy"] == strategy], slopes[slopes["strategy"] == strategy], style)
        value_axis(axes, points["latency_ms"], "latency of one step (ms)")
        if panel == 0:
            context_axis(axes, steps["n_depth"] + steps["n_prompt"], POSITION)
            axes.set_title("all strategies (log scales)" if len(panels) > 1 else "", fontsize=10)
        else:
            linear_axis(axes, points["position"], POSITION)
            axes.set_title("cached strategies alone (from zero)", fontsize=10)
    legend_below(figure, figure.axes[0], columns=2, title="slope in ms per 1,000 tokens [95 % interval]")
    return figure


def throughput(summary: pd.DataFrame) -> Figure:
    """Tokens per second of prefill and of decode against context length; `summary` are rows of one setting."""
    setting, _ = next(by_setting(summary, also=PLOT_COLUMNS))
    figure = make_figure("Throughput, with 95 % intervals of the median", setting, 4.2)
    for number, phase in enumerate(PHASES):
        rows = summary[summary["phase"] == phase]
        scale = rows["tokens_per_s"] * rows["latency_ms"]  # tokens per second = scale / latency
        rows = rows.assign(low=scale / rows["latency_ms_high"], high=scale / rows["latency_ms_low"])
        axes = figure.add_subplot(1, len(PHASES), number + 1)
        _curves(axes, rows, "tokens_per_s", "low", "high")
        value_axis(axes, rows["tokens_per_s"], f"{phase} throughput (tokens/s)")
        axes.set_title(phase, fontsize=10)
    legend_below(figure, figure.axes[0], columns=4)
    return figure


def speedup(summary: pd.DataFrame) -> Figure:
    """Time of naive / time of a strategy, for prefill and decode, against context length; one setting."""
    setting, _ = next(by_setting(summary, also=PLOT_COLUMNS))
    figure = make_figure("Speed-up over naive re-feed, with 95 % intervals", setting, 4.2)
    others = summary[(summary["strategy"] != "naive") & summary["speedup_vs_naive"].notna()]
    for number, phase in enumerate(PHASES):
        rows = others[others["phase"] == phase]
        axes = figure.add_subplot(1, len(PHASES), number + 1)
        axes.axhline(1, color=GUIDE, linewidth=1.2, zorder=1)
        axes.annotate(
            "naive = 1", (0.98, 1), xycoords=("axes fraction", "data"), xytext=(0, -4), textcoords="offset points",
            ha="right", va="top", color=GUIDE, fontsize=9,
        )  # fmt: skip
        _curves(axes, rows, "speedup_vs_naive", "speedup_low", "speedup_high")
        value_axis(axes, [1, *rows["speedup_vs_naive"]], f"{phase} speed-up (times)")
        axes.set_title(phase, fontsize=10)
    legend_below(figure, figure.axes[0], columns=4)
    return figure


def _step_curve(axes: Axes, points: pd.DataFrame, slope: pd.DataFrame, style: Style) -> None:
    """The points of a strategy, every few of them marked, and the fitted line through them."""
    if points.empty:
        return
    label = str(points["strategy"].iloc[0])
    if not slope.empty:
        fit = slope.iloc[0]
        label += f"  {with_interval(fit['slope_ms_per_1000_tokens'], fit['slope_low'], fit['slope_high'])}"
        position = np.geomspace(fit["first_position"], fit["last_position"], 100)
        line = fit["intercept_ms"] + fit["slope_ms_per_1000_tokens"] * position / 1000
        axes.plot(position, line, color=style.color, linestyle=style.line, linewidth=1.4)
    axes.plot(points["position"], points["latency_ms"], linestyle="none", label=label, **style.marks())


def _curves(axes: Axes, rows: pd.DataFrame, value: str, low: str, high: str) -> None:
    """A line per strategy over the context lengths, with its intervals."""
    all_styles = styles(rows["strategy"])
    for place, (strategy, style) in enumerate(all_styles.items()):
        own = rows[rows["strategy"] == strategy].sort_values("n_prompt")
        x = shifted(own["n_depth"] + own["n_prompt"], place, len(all_styles))
        axes.plot(x, own[value], linestyle=style.line, linewidth=1.4, label=strategy, **style.marks())
        axes.vlines(x, own[low], own[high], color=style.color, linewidth=1.6)
    context_axis(axes, rows["n_depth"] + rows["n_prompt"], CONTEXT)


def _suffix(rows: pd.DataFrame, all_rows: pd.DataFrame) -> str:
    """What tells these rows from the others of the run, for a file name: `-bfloat16-b4`; nothing if it is all of them."""
    short = {"n_threads": "t", "batch_size": "b", "n_gen": "n", "n_depth": "d"}
    columns = [column for column in [*SETTING_COLUMNS, *PLOT_COLUMNS] if all_rows[column].nunique() > 1]
    own = [column for column in columns if rows[column].nunique() == 1]
    return "".join(f"-{short.get(column, '')}{rows[column].iloc[0]}" for column in own).replace("/", "_").replace(":", "_")
