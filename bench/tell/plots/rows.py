"""Frames -> figures that set a run against the machine's roofs: time over rows, and a token's waterfall."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from bench.case import HOST_DEVICES
from bench.tell.plots.ladder import catalogue_place, ladder, look, threads
from bench.tell.plots.steps import EXTENT, PLOT_COLUMNS, file_suffix, intervals
from bench.tell.plots.style import (
    GUIDE,
    context_axis,
    legend_below,
    make_figure,
    value_axis,
)
from bench.tell.words import SETTING_COLUMNS, by_setting, context, number, setting
from kvcache.strategies.catalogue import REFEEDING

MACHINE_COLUMNS = [column for column in SETTING_COLUMNS if column != "batch_size"]
"""What the points of a plot over rows have in common: a batch of prompts is rows too."""

MIN_ROW_COUNTS = 4
"""Points of a plot over rows, from FEW_ROWS or less on: with fewer GEMV is not seen to become GEMM."""
FEW_ROWS = 8

KERNELS = "kernels below\nthe roof"
PARTS = {"weights read": "#0072B2", "KV read": "#56B4E9", KERNELS: "#D55E00", "framework": "#E69F00"}
"""The steps of the waterfall and their colours."""

UNKNOWN = f"{KERNELS},\nframework"
"""The last two of them where the run does not tell them apart: on CUDA, for a model that cannot be shrunk, or where the
framework, timed apart, took more than is left."""


def figures(summary: pd.DataFrame) -> dict[str, Figure]:
    """Every plot that the run holds the data for, by file name. `summary` as `summarize` makes it."""
    timed = summary[summary["latency_ms"].notna()]
    known = timed[timed["compute_floor_ms"].notna()]
    drawn: dict[str, Figure] = {}
    columns = [*MACHINE_COLUMNS, "strategy"]
    for _, rows in _prefills(known).groupby(columns, sort=False):
        if rows["rows"].nunique() >= MIN_ROW_COUNTS and rows["rows"].min() <= FEW_ROWS:
            drawn["rows" + file_suffix(rows, _prefills(known), columns)] = rows_roofline(rows)
    for _, rows in by_setting(known, also=EXTENT):
        suffix = file_suffix(rows, known, PLOT_COLUMNS)
        if not waterfall_cell(rows).empty:
            drawn["waterfall" + suffix] = waterfall(rows)
        if len(set(rows["strategy"])) > 1:
            drawn["ladder" + suffix] = ladder(rows)
    columns = [column for column in PLOT_COLUMNS if column != "n_threads"]
    for _, rows in timed[timed["device"].isin(HOST_DEVICES)].groupby(columns, sort=False):
        if len(set(rows["n_threads"])) > 1:
            drawn["threads" + file_suffix(rows, timed, columns)] = threads(rows)
    return drawn


def rows_roofline(prefills: pd.DataFrame) -> Figure:
    """Time of a forward against its rows (n_prompt x batch), a line per depth, and both roofs with their crossing.

    `prefills` are those of one strategy and machine setting, with a column `rows`.
    """
    first = prefills.iloc[0].to_dict()
    how = intervals(prefills["latency_ms_low"])
    title = f"Time of a forward against the rows it is fed, {first['strategy']}, median {how}"
    figure = make_figure(title, setting(first).rpartition(", batch")[0], 5.0)
    axes = figure.add_subplot()
    for place, (depth, own) in enumerate(prefills.groupby("n_depth")):
        line = own.sort_values("rows")
        drawn = look(place)
        axes.plot(line["rows"], line["latency_ms"], label=f"{depth:,} tokens cached before", linewidth=1.4, **drawn)
        axes.vlines(line["rows"], line["latency_ms_low"], line["latency_ms_high"], color=drawn["color"], linewidth=1.6)
    roofs = _median_roofs(prefills)
    read = f"weights and KV read at {number(prefills['read_bytes_per_s'].median() / 1e9)} GB/s"
    multiplied = f"FLOPs at {number(prefills['gemm_flop_per_s'].median() / 1e9)} GFLOP/s"
    axes.plot(roofs["rows"], roofs["memory_floor_ms"], color="#222222", linewidth=2.2, label=read)
    axes.plot(
        roofs["rows"],
        roofs["compute_floor_ms"],
        color="#222222",
        linewidth=2.2,
        linestyle=(0, (1, 1)),
        label=multiplied,
    )
    lowest = roofs["memory_floor_ms"].min() / 4
    value_axis(axes, [lowest, *prefills["latency_ms"], *prefills["memory_floor_ms"]], "time of a forward (ms)")
    axes.set_ylim(bottom=lowest)
    context_axis(axes, prefills["rows"], "rows in a forward (new tokens x batch)")
    crossing = crossing_rows(roofs)
    if crossing is not None:
        axes.axvline(crossing, color=GUIDE, linewidth=1, zorder=1)
        axes.text(
            0.985,
            0.03,
            f"the roofs cross at {number(crossing)} rows:\nbelow that memory is the wall, above it compute",
            transform=axes.transAxes,
            ha="right",
            fontsize=9,
        )
    legend_below(figure, axes, columns=2)
    return figure


def _median_roofs(prefills: pd.DataFrame) -> pd.DataFrame:
    """The floors of the smallest depth, all under the median of the roofs: each cell's own drift with the machine."""
    roofs = prefills[prefills["n_depth"] == prefills["n_depth"].min()].sort_values("rows")
    drift = {
        floor: roofs[rate] / prefills[rate].median()
        for floor, rate in (("compute_floor_ms", "gemm_flop_per_s"), ("memory_floor_ms", "read_bytes_per_s"))
    }
    settled: pd.DataFrame = roofs.assign(**{floor: roofs[floor] * share for floor, share in drift.items()})
    return settled


def crossing_rows(roofs: pd.DataFrame) -> float | None:
    """The rows at which both floors are equal, between two measured row counts (straight lines in the logs)."""
    rows = np.log(roofs["rows"].to_numpy(dtype=float))
    above = np.log(roofs["compute_floor_ms"].to_numpy()) - np.log(roofs["memory_floor_ms"].to_numpy())
    if above[0] > 0 or above[-1] < 0:
        return None
    return float(np.exp(np.interp(0.0, above, rows)))


def waterfall_cell(summary: pd.DataFrame) -> pd.DataFrame:
    """The decode rows of naive and of the plainest cached strategy at the longest prompt that has both; or no row."""
    decode = summary[summary["phase"] == "decode"]
    for _, rows in sorted(decode.groupby("n_prompt"), reverse=True):
        ordered = rows.sort_values("strategy", key=lambda names: names.map(catalogue_place))
        if len(ordered) > 1 and ordered["strategy"].iloc[0] in REFEEDING:
            return ordered.iloc[:2]
    return decode.iloc[:0]


def waterfall(summary: pd.DataFrame) -> Figure:
    """Why a cached token is not as many times cheaper as it feeds fewer tokens: where its time goes, in ms."""
    naive, cached = (row for _, row in waterfall_cell(summary).iterrows())
    more_tokens = naive["tokens_processed"] / cached["tokens_processed"]
    faster = cached["speedup_vs_naive"]  # paired, as the table has it
    parts = waterfall_parts(summary, cached)
    title = (
        f"Naive re-feed processes {number(more_tokens)} times the tokens, {cached['strategy']} is "
        f"{number(faster)} times faster:"
    )
    words, _ = next(by_setting(summary, also=EXTENT))
    where = f"where a token's {number(cached['latency_ms'])} ms go"
    figure = make_figure(title, f"{where}\n{words}, prompt {context(cached.to_dict())}", 4.4)
    axes = figure.add_subplot()
    bars = [("a naive step,\nper token fed", 0.0, naive["latency_ms"] / more_tokens, "#222222")]
    below = 0.0
    for name, part in parts.items():
        bars.append((name, below, part, PARTS.get(name, PARTS[KERNELS])))
        below += part
    bars.append((f"a step of\n{cached['strategy']}", 0.0, cached["latency_ms"], GUIDE))
    for place, (_, start, height, color) in enumerate(bars):
        axes.bar(place, height, bottom=start, color=color, width=0.62)
        top = max(start, start + height)
        axes.annotate(f"{number(height)} ms", (place, top), (0, 3), textcoords="offset points", ha="center", fontsize=9)
        if 0 < place < len(bars) - 1:
            axes.plot([place + 0.31, place + 0.69], [start + height] * 2, color=GUIDE, linewidth=1)
    axes.xaxis.set_major_locator(FixedLocator(range(len(bars))))
    axes.set_xticklabels([name for name, *_ in bars])
    value_axis(axes, [height + start for _, start, height, _ in bars], "time of a token (ms)", from_zero=True)
    return figure


def waterfall_parts(summary: pd.DataFrame, cached: pd.Series) -> dict[str, float]:
    """Milliseconds of a decode step by `PARTS`: weights (and logits) and KV at the roof, the framework, and the rest.

    A step reads and writes the keys and values held then: on average those between the prefill's end and the last
    step's.
    """
    same = (summary["strategy"] == cached["strategy"]) & (summary["n_prompt"] == cached["n_prompt"])
    (at_first,) = summary[same & (summary["phase"] == "prefill")]["kv_bytes_predicted"]
    kv_ms = (at_first + cached["kv_bytes_predicted"]) / 2 / cached["read_bytes_per_s"] * 1000
    weights_ms = cached["memory_floor_ms"] - kv_ms
    rest_ms, framework_ms = cached["latency_ms"] - weights_ms - kv_ms, cached["framework_ms"]
    parts = {"weights read": weights_ms, "KV read": kv_ms}
    if framework_ms <= rest_ms:  # it was timed apart, and a machine may be slower then
        return parts | {KERNELS: rest_ms - framework_ms, "framework": framework_ms}
    return parts | {UNKNOWN: rest_ms}


def _prefills(summary: pd.DataFrame) -> pd.DataFrame:
    """The prefills of cached strategies, with the rows of each forward; the smallest batch where two have the same."""
    own = summary[(summary["phase"] == "prefill") & ~summary["strategy"].isin(REFEEDING)]
    own = own.assign(rows=(own["n_prompt"] * own["batch_size"]).astype("int64")).sort_values(
        "batch_size", kind="stable"
    )
    return own.drop_duplicates([*MACHINE_COLUMNS, "strategy", "n_depth", "rows"])
