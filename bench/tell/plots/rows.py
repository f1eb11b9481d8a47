"""Frames -> figure: the time of a forward over the rows it is fed, where GEMV becomes GEMM, under the roofs."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from bench.tell.drawn import MOST_LINES, few, few_contexts
from bench.tell.plots.steps import intervals
from bench.tell.plots.style import GUIDE, context_axis, legend_below, look, make_figure, value_axis
from bench.tell.words import SETTING_COLUMNS, number, setting
from kvcache.strategies.catalogue import REFEEDING

MACHINE_COLUMNS = [column for column in SETTING_COLUMNS if column != "batch_size"]
"""What the points of a plot over rows have in common: a batch of prompts is rows too."""

MIN_ROW_COUNTS = 4
"""Points of a plot over rows, from FEW_ROWS or less on: with fewer GEMV is not seen to become GEMM."""
FEW_ROWS = 8


def is_drawn(prefills: pd.DataFrame) -> bool:
    """Return whether these prefills of one strategy have row counts enough for the plot."""
    return len(set(prefills["rows"])) >= MIN_ROW_COUNTS and prefills["rows"].min() <= FEW_ROWS


def rows_roofline(prefills: pd.DataFrame) -> Figure:
    """Draw the time of a forward against its rows (n_prompt x batch), a line per depth, and where the roofs cross.

    `prefills` are those of one strategy and machine setting, with a column `rows`.
    """
    prefills = prefills[prefills["n_depth"].isin(few(sorted(set(prefills["n_depth"])), MOST_LINES))]
    prefills = few_contexts(prefills, ["n_depth"])
    first = prefills.iloc[0].to_dict()
    how = intervals(prefills["latency_ms_low"])
    title = f"Time of a forward against the rows it is fed, {first['strategy']}, median {how}"
    figure = make_figure(title, setting(first, only=MACHINE_COLUMNS), 5.0)
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
    """Draw the floors of the smallest depth under the median of the roofs: each cell's own drift with the machine."""
    roofs = prefills[prefills["n_depth"] == prefills["n_depth"].min()].sort_values("rows")
    drift = {
        floor: roofs[rate] / prefills[rate].median()
        for floor, rate in (("compute_floor_ms", "gemm_flop_per_s"), ("memory_floor_ms", "read_bytes_per_s"))
    }
    settled: pd.DataFrame = roofs.assign(**{floor: roofs[floor] * share for floor, share in drift.items()})
    return settled


def crossing_rows(roofs: pd.DataFrame) -> float | None:
    """Find the rows at which both floors are equal, between two measured row counts (straight lines in the logs)."""
    rows = np.log(roofs["rows"].to_numpy(dtype=float))
    above = np.log(roofs["compute_floor_ms"].to_numpy()) - np.log(roofs["memory_floor_ms"].to_numpy())
    if above[0] > 0 or above[-1] < 0:
        return None
    return float(np.exp(np.interp(0.0, above, rows)))


def cached_prefills(summary: pd.DataFrame) -> pd.DataFrame:
    """Take the prefills of cached strategies, with the rows of each forward; of two alike the smaller batch."""
    own = summary[(summary["phase"] == "prefill") & ~summary["strategy"].isin(REFEEDING)]
    own = own.assign(rows=(own["n_prompt"] * own["batch_size"]).astype("int64")).sort_values(
        "batch_size", kind="stable"
    )
    return own.drop_duplicates([*MACHINE_COLUMNS, "strategy", "n_depth", "rows"])
