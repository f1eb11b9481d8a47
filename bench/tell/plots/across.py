"""Frames -> figures across a setting that a run varies: dtypes, batch sizes or models side by side in one figure."""

from functools import partial

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.naming import context
from bench.tell.drawn import MOST_LINES, MOST_PLOTS, few
from bench.tell.plots.steps import file_suffix, intervals
from bench.tell.plots.style import PHASES, Drawings, legend_below, make_figure, styles, value_axis
from bench.tell.words import EXTENT, SETTING_COLUMNS, representing, setting

ACROSS: dict[str, str] = {"batch_size": "batch size", "dtype": "dtype", "model": "model", "n_gen": "new tokens"}
"""Settings that get an axis of their own, and its label. Threads have their own plot, lengths are in all others."""

MOST_ROWS = 4
"""Values of a second setting that get a row of panels each; with more each has a file."""


def figures(summary: pd.DataFrame) -> Drawings:
    """List throughput across each setting of `ACROSS` that the run varies, by file name (without suffix).

    `summary` are rows of `summarize` that have a time. A second setting that varies makes the rows of panels.
    """
    varying = [column for column in ACROSS if len(set(summary[column])) > 1]
    drawn: Drawings = {}
    for column in varying:
        others = [name for name in varying if name != column and len(set(summary[name])) <= MOST_ROWS]
        rows_by = others[0] if others else None
        alike = [name for name in [*SETTING_COLUMNS, *EXTENT] if name not in (column, rows_by)]
        varied = summary[summary.groupby(alike)[column].transform("nunique") > 1]
        for _, group in few(varied.groupby(alike, sort=False), MOST_PLOTS):
            rows = _longest_common(group, column)
            rows = rows[rows[column].isin(few(sorted(set(rows[column])), MOST_LINES))]
            if len(set(rows[column])) > 1:
                name = f"across-{column.removesuffix('_size')}{file_suffix(group, summary, alike)}"
                drawn[name] = partial(across, rows, column, rows_by)
    return drawn


def across(rows: pd.DataFrame, column: str, rows_by: str | None) -> Figure:
    """Draw throughput against the values of `column`, a line per strategy, a column of panels per phase.

    `rows` are of one prompt length and agree in everything else but `rows_by`, whose values have a row of panels each.
    """
    values = list(dict.fromkeys(rows[column] if column in ("dtype", "model") else sorted(rows[column])))
    bands = [rows] if rows_by is None else [band for _, band in rows.groupby(rows_by, sort=False)]
    phases = [phase for phase in PHASES if (rows["phase"] == phase).any()]
    first = representing(rows)
    constant = [name for name in SETTING_COLUMNS if name not in (column, rows_by)]
    words = f"{setting(first, only=constant)}, prompt {context(first)}"
    title = f"Throughput across {ACROSS[column]}, median {intervals(rows['latency_ms_low'])}"
    figure = make_figure(title, words, 1.4 + 2.6 * len(bands))
    grid = figure.subplots(len(bands), len(phases), sharex=True, sharey="col", squeeze=False)
    for band, line_of_panels in zip(bands, grid, strict=True):
        named = "" if rows_by is None else f", {ACROSS[rows_by]} {band[rows_by].iloc[0]}"
        for phase, axes in zip(phases, line_of_panels, strict=True):
            _panel(axes, band[band["phase"] == phase], column, values)
            in_column = rows[rows["phase"] == phase]
            fastest = in_column["tokens_per_s"] * in_column["latency_ms"] / in_column["latency_ms_low"]
            value_axis(axes, [*in_column["tokens_per_s"], *fastest.dropna()], "tokens/s")
            axes.set_title(f"{phase}{named}", fontsize=10, parse_math=False)
    for axes in grid[-1]:
        axes.set_xticks(range(len(values)), [f"{value}" for value in values], parse_math=False)
        axes.set_xlim(-0.4, len(values) - 0.6)
        axes.set_xlabel(ACROSS[column])
    legend_below(figure, grid[0][0], columns=5)
    return figure


def _panel(axes: Axes, rows: pd.DataFrame, column: str, values: list[object]) -> None:
    looks = styles(rows["strategy"])
    for number, (strategy, style) in enumerate(looks.items()):
        own = rows[rows["strategy"] == strategy]
        own = own.assign(place=own[column].map(values.index)).sort_values("place")
        x = own["place"] + 0.06 * (number - (len(looks) - 1) / 2)
        scale = own["tokens_per_s"] * own["latency_ms"]
        axes.plot(x, own["tokens_per_s"], label=strategy, **style.curve)
        axes.vlines(x, scale / own["latency_ms_high"], scale / own["latency_ms_low"], color=style.color, linewidth=1.6)


def _longest_common(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Keep the rows of the longest prompt that most values of `column` have."""
    counts = {length: len(set(own[column])) for length, own in rows.groupby("n_prompt")}
    return rows.query("n_prompt == @longest", local_dict={"longest": max(counts, key=lambda n: (counts[n], n))})
