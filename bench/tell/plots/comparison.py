"""Frames -> figures of a comparison: a forest of ratios, and the latencies of both runs one over the other."""

import math

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from bench.naming import namer
from bench.tell.drawn import MOST_CASES, MOST_LINES, MOST_PLOTS, few, few_contexts
from bench.tell.plots import style as drawing
from bench.tell.plots.steps import CONTEXT, file_suffix, intervals
from bench.tell.words import EXTENT, PLOT_COLUMNS, by_setting

ROW_HEIGHT_IN = 0.26
PHASE_MARKS = {"prefill": ("#E69F00", "s"), "decode": ("#0072B2", "o")}
LATENCY = {"prefill": "TTFT (ms)", "decode": "TPOT (ms)"}


def comparison_figures(rows: pd.DataFrame, a: str, b: str) -> dict[str, Figure]:
    """Draw both plots of each setting, by file name; `rows` and `labels` of a `Comparison`."""
    drawn: dict[str, Figure] = {}
    for _, group in few(by_setting(rows, also=EXTENT), MOST_PLOTS):
        suffix = file_suffix(group, rows, PLOT_COLUMNS)
        drawn["forest" + suffix] = forest(group, a, b)
        drawn["overlay" + suffix] = overlay(few_contexts(group, EXTENT, MOST_LINES), a, b)
    return drawn


def forest(rows: pd.DataFrame, a: str, b: str) -> Figure:
    """Draw a line per case and phase: time in B / time in A with its unpaired interval, the largest gain on top.

    `rows` are of one setting; of many those are drawn whose ratio is furthest from 1. The marker of a row without an
    interval is hollow.
    """
    furthest = rows["ratio"].map(math.log).abs().nlargest(MOST_CASES).index
    some = f"\nthe {MOST_CASES} of {len(rows):,} rows that differ most" if len(rows) > MOST_CASES else ""
    rows = rows.loc[furthest].sort_values("ratio", ascending=False, ignore_index=True)
    figure = drawing.make_figure(
        f"Time of B / time of A, unpaired, {intervals(rows['ratio_low'], rows['verdict'])}",
        _subtitle(rows, a, b) + some,
        2 + ROW_HEIGHT_IN * len(rows),
    )
    axes = figure.add_subplot()
    axes.axvline(1, color=drawing.GUIDE, linewidth=1.2, zorder=1)
    for phase, (color, marker) in PHASE_MARKS.items():
        own = rows[rows["phase"] == phase]
        if own.empty:
            continue
        certain = own["ratio_low"].notna()
        axes.hlines(own.index[certain], own["ratio_low"][certain], own["ratio_high"][certain], color=color, linewidth=2)
        axes.plot(own["ratio"][certain], own.index[certain], marker, color=color, label=phase)
        axes.plot(own["ratio"][~certain], own.index[~certain], marker, color=color, markerfacecolor="white")
    records = rows.to_dict("records")
    name = namer(records)
    axes.set_yticks(range(len(rows)), [name(row, row["phase"]) for row in records])
    axes.set_ylim(-0.7, len(rows) - 0.3)
    ratio_axis(axes, rows, "B is faster   <   time of B / time of A (ratio)   >   B is slower")
    drawing.legend_below(figure, axes, columns=2)
    return figure


def overlay(rows: pd.DataFrame, a: str, b: str) -> Figure:
    """Draw TTFT and TPOT of both runs against context length, a row of panels per phase and a column per strategy.

    Run A is drawn in full lines, B broken and hollow. `rows` are of one setting. Strategies that take the same time
    would hide one another in one panel.
    """
    looks = drawing.styles(rows["strategy"])
    phases = [phase for phase in drawing.PHASES if (rows["phase"] == phase).any()]
    title = f"Latency of both runs, median {intervals(rows['a_low'])}"
    figure = drawing.make_figure(title, _subtitle(rows, a, b), 1.4 + 2.3 * len(phases))
    grid = figure.subplots(len(phases), len(looks), sharex=True, sharey="row", squeeze=False)
    lengths = rows["n_depth"] + rows["n_prompt"]
    for phase, line_of_panels in zip(phases, grid, strict=True):
        own_phase = rows[rows["phase"] == phase]
        for (strategy, style), axes in zip(looks.items(), line_of_panels, strict=True):
            own = own_phase[own_phase["strategy"] == strategy].sort_values(["n_depth", "n_prompt"])
            for place, (run, line, face) in enumerate((("a", "-", style.color), ("b", "--", "white"))):
                x = drawing.shifted(own["n_depth"] + own["n_prompt"], place, 2)
                curve = {**style.curve, "linestyle": line, "markerfacecolor": face}
                axes.plot(x, own[f"{run}_ms"], **curve)
                axes.vlines(x, own[f"{run}_low"], own[f"{run}_high"], color=style.color, linewidth=1.6)
            drawing.value_axis(axes, own_phase[_ENDS].to_numpy(dtype=float).ravel(), LATENCY[phase])
            drawing.context_axis(axes, lengths, CONTEXT, most_ticks=max(2, 8 // len(looks)))
            axes.set_xlabel(axes.get_xlabel() if strategy == list(looks)[len(looks) // 2] else "", fontsize=9)
            axes.label_outer()
        line_of_panels[0].set_ylabel(f"{phase}: {line_of_panels[0].get_ylabel()}", fontsize=9)
    for strategy, axes in zip(looks, grid[0], strict=True):
        axes.set_title(strategy, fontsize=10)
    for line, face, label in (("-", drawing.GUIDE, "A"), ("--", "white", "B")):
        grid[0][0].plot([], [], color=drawing.GUIDE, linestyle=line, marker="o", markerfacecolor=face, label=label)
    drawing.legend_below(figure, grid[0][0], columns=2)
    return figure


_ENDS = ["a_ms", "b_ms", "a_low", "b_low", "a_high", "b_high"]
"""What the value axis must hold: an interval that reaches beyond it would be cut without a mark."""


def _subtitle(rows: pd.DataFrame, a: str, b: str) -> str:
    setting, _ = next(by_setting(rows, also=EXTENT))
    return f"{setting}\nA: {a}   B: {b}"


def ratio_axis(axes: Axes, rows: pd.DataFrame, label: str) -> None:
    """Make the x axis logarithmic, with 1 in view and as much room for faster as for slower."""
    known = pd.concat([rows["ratio"], rows["ratio_low"], rows["ratio_high"]]).dropna()
    reach = max(1.05, *(math.exp(abs(math.log(value))) for value in known)) ** 1.1
    axes.set_xscale("log")
    axes.set_xlim(1 / reach, reach)
    axes.xaxis.set_major_locator(FixedLocator(_ratio_ticks(reach)))
    axes.xaxis.set_major_formatter(drawing.THOUSANDS)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)
    drawing.open_frame(axes, "x")


def _ratio_ticks(reach: float) -> list[float]:
    """Round ratios around 1, fine where all are near it."""
    if reach < 1.15:
        return [0.9, 0.95, 1, 1.05, 1.1]
    if reach < 1.5:
        return [0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.4]
    if reach < 2.2:
        return [0.5, 0.6, 0.7, 0.8, 1, 1.2, 1.4, 1.6, 2]
    decades = math.ceil(math.log10(reach))
    steps = (1, 2, 5) if reach < 50 else (1,)
    return [step * 10.0**power for power in range(-decades, decades + 1) for step in steps]
