"""Frame -> figure: bytes against speed against quality of every kind of cache at one length, and the Pareto front."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from bench.naming import context, plural
from bench.tell.plots.steps import intervals
from bench.tell.plots.style import GUIDE, THOUSANDS, make_figure, open_frame
from bench.tell.words import representing, setting

LOSS = LinearSegmentedColormap.from_list("loss", colormaps["YlOrRd"](np.linspace(0.1, 1, 64)))
LEAST_KL = 1e-8
"""Nats below which all divergences have the same colour: rounding."""

EXACT: dict[str, Any] = {"marker": "s", "markersize": 7, "markerfacecolor": "#0072B2", "markeredgecolor": "#222222"}
UNJUDGED: dict[str, Any] = {"marker": "o", "markersize": 8, "markerfacecolor": "#BBBBBB", "markeredgecolor": "#222222"}


def trade(rows: pd.DataFrame) -> Figure:
    """Draw bytes per token fed against TPOT; colour is the KL, squares are exact, the line the Pareto front.

    `rows` are the decode rows of one cell, with a time and a cache each.
    """
    first = representing(rows)
    title = f"The trade: bytes, time and quality of each cache, median {intervals(rows['latency_ms_low'])}"
    words = f"{setting(first)}, prompt {context(first)}, {plural(first['n_gen'], 'new token')}"
    figure = make_figure(title, words, 5.2)
    axes = figure.add_subplot()
    tokens = rows["batch_size"] * (rows["n_depth"] + rows["n_prompt"] + rows["n_gen"] - 1)
    rows = rows.assign(x=rows["kv_bytes_allocated"] / tokens, y=rows["latency_ms"])
    _front(axes, rows)
    axes.vlines(rows["x"], rows["latency_ms_low"], rows["latency_ms_high"], color=GUIDE, linewidth=1.4, zorder=2)
    exact, lossy = rows[rows["exact"] != "false"], rows[rows["exact"] == "false"]
    if not exact.empty:
        axes.plot(exact["x"], exact["y"], linestyle="none", zorder=3, label="exact", **EXACT)
    _lossy(figure, axes, lossy)
    _axes(axes, rows)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.draw_without_rendering()  # settles the layout, which labels must know
    _name_points(axes, rows)
    return figure


def pareto(rows: pd.DataFrame) -> pd.DataFrame:
    """Take the rows that no other beats in both `x` and `y` (smaller is better), from the smallest `x` on."""
    ordered = rows.sort_values(["x", "y"])
    best_before = ordered["y"].cummin().shift(fill_value=np.inf)
    return ordered[ordered["y"] < best_before]


def _front(axes: Axes, rows: pd.DataFrame) -> None:
    front = pareto(rows)
    if len(front) < 2:  # one kind beats all others: there is no line
        return
    axes.step(front["x"], front["y"], where="post", color=GUIDE, linewidth=1.2, linestyle="--", zorder=1)
    axes.plot([], [], color=GUIDE, linewidth=1.2, linestyle="--", label="Pareto front of bytes and time")


def _lossy(figure: Figure, axes: Axes, lossy: pd.DataFrame) -> None:
    """Draw the lossy kinds and the scale of their colours, on which a line shows what bfloat16 alone does.

    One that was not judged, since its text could not, is grey.
    """
    unjudged, lossy = lossy[lossy["logit_kl"].isna()], lossy[lossy["logit_kl"].notna()]
    if not unjudged.empty:
        axes.plot(unjudged["x"], unjudged["y"], linestyle="none", zorder=3, label="lossy, not judged", **UNJUDGED)
    kl = lossy["logit_kl"].clip(lower=LEAST_KL)
    floors = lossy["logit_kl_floor"].dropna()
    if lossy.empty:
        return
    known = [*kl, *floors[floors > LEAST_KL]]
    norm = LogNorm(min(known) / 1.5, max(known) * 1.5)
    points = axes.scatter(
        lossy["x"], lossy["y"], s=70, c=kl, cmap=LOSS, norm=norm, edgecolors="#222222", zorder=3, label="lossy"
    )
    bar = figure.colorbar(
        points, ax=axes, pad=0.02, extend="min" if (lossy["logit_kl"] < LEAST_KL).any() else "neither"
    )
    bar.set_label("logit KL (nats), log scale", fontsize=9)
    if len(floors):
        bar.ax.axhline(floors.median(), color="#0072B2", linewidth=2)
        axes.plot([], [], color="#0072B2", linewidth=2, label="on the scale: what bfloat16 alone does")


def _axes(axes: Axes, rows: pd.DataFrame) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlim(rows["x"].min() / 1.6, rows["x"].max() * 1.6)
    axes.xaxis.set_major_formatter(THOUSANDS)
    axes.set_xlabel("bytes allocated per token fed, log scale (less is better)")
    tallest = rows["latency_ms_high"].fillna(rows["y"]).max()
    axes.set_ylim(0, 1.12 * tallest)
    axes.yaxis.set_major_formatter(THOUSANDS)
    axes.set_ylabel("TPOT (ms; less is better)")
    open_frame(axes, "y")


_PLACES = [
    (distance * x, distance * y)
    for distance in (8, 20, 34, 50, 68)
    for x, y in ((0.7, 0.8), (1, 0), (-1, 0), (-0.7, 0.8), (0.7, -0.8), (-0.7, -0.8), (0, 1.2), (0, -1.2))
]
"""Offsets in points at which a name may stand, the nearest first."""


def _name_points(axes: Axes, rows: pd.DataFrame) -> None:
    """Write each strategy's name beside its point where no other name or point is."""
    pixels = axes.transData.transform(rows[["x", "y"]].to_numpy(dtype=float))
    taken = [Bbox.from_bounds(x - 9, y - 9, 18, 18) for x, y in pixels]
    inside = axes.get_window_extent()
    for name, x, y in rows[["strategy", "x", "y"]].itertuples(index=False):
        label = axes.annotate(name, (x, y), (0, 0), textcoords="offset points", fontsize=8.5, bbox=_PATCH)
        box, dx, dy = label.get_window_extent(), 0.0, 0.0
        for dx, dy in _PLACES:  # the last one stays
            label.set(ha="left" if dx > 0 else "right" if dx < 0 else "center", va="center", position=(dx, dy))
            box = label.get_window_extent()
            free = not any(box.overlaps(other) for other in taken)
            if free and inside.containsx(box.x0) and inside.containsx(box.x1) and inside.fully_containsy(box.y0):
                break
        taken.append(box)
        if abs(dx) + abs(dy) > 16:
            axes.annotate("", (x, y), (dx, dy), textcoords="offset points", arrowprops=_LEADER, zorder=2)


_PATCH = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
"""Behind a name: the front may pass there."""

_LEADER = {"arrowstyle": "-", "color": GUIDE, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4}
