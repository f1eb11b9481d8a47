"""The drift of a baseline as a figure."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bench.tell.plots.style import GUIDE, make_figure, styles


def figure(frame: pd.DataFrame, name: str) -> Figure:
    """Draw the relative time of each session, prefill beside decode; a line breaks where the machine changes."""
    order = {session: place for place, session in enumerate(dict.fromkeys(frame["session"]), start=1)}
    drawn = make_figure("Time of each session, relative to the first of its machine", f"baseline {name}", 4.2)
    looks = styles(frame["strategy"])
    phases = [phase for phase in ("prefill", "decode") if (frame["phase"] == phase).any()]
    for place, phase in enumerate(phases, start=1):
        axes = drawn.add_subplot(1, len(phases), place, sharey=drawn.axes[0] if drawn.axes else None)
        rows = frame[frame["phase"] == phase]
        for (strategy, machine), group in rows.groupby(["strategy", "machine"], sort=False):
            label = str(strategy) if machine == rows["machine"].iloc[0] else None
            axes.plot(group["session"].map(order), group["relative_time"], label=label, **looks[str(strategy)].curve)
        for session in rows.loc[rows["more_work"] > 0, "session"].unique():
            axes.axvline(order[session], color=GUIDE, linewidth=0.8, linestyle=":")
        axes.axhline(1, color=GUIDE, linewidth=0.8)
        axes.set_title(phase, fontsize=10)
        axes.set_xlabel("session, oldest first (dotted: a counter grew)", fontsize=9)
        axes.set_xlim(0.5, len(order) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))  # of two by default: then 0.8, 1.2
        axes.set_ylabel("time / time of the first session" if place == 1 else "")
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, 0.9), max(high, 1.1))
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = drawn.axes[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, handlelength=3.5)
    return drawn
