"""The drift of a baseline as a figure."""

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bench.tell.plots.style import GUIDE, legend_below, make_figure, panels, styles


def figure(frame: pd.DataFrame, name: str) -> Figure:
    """Draw the relative time of each session, prefill beside decode; a line breaks where the machine changes."""
    order = {session: place for place, session in enumerate(dict.fromkeys(frame["session"]), start=1)}
    drawn = make_figure("Time of each session, relative to the first of its machine", f"baseline {name}", 4.2)
    looks = styles(frame["strategy"])
    for place, _, axes, rows in panels(drawn, frame):
        for (strategy, machine), group in rows.groupby(["strategy", "machine"], sort=False):
            label = str(strategy) if machine == rows["machine"].iloc[0] else None
            axes.plot(group["session"].map(order), group["relative_time"], label=label, **looks[str(strategy)].curve)
        for session in rows.loc[rows["more_work"] > 0, "session"].unique():
            axes.axvline(order[session], color=GUIDE, linewidth=0.8, linestyle=":")
        axes.axhline(1, color=GUIDE, linewidth=0.8)
        axes.set_xlabel("session, oldest first (dotted: a counter grew)", fontsize=9)
        axes.set_xlim(0.5, len(order) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))  # of two by default: then 0.8, 1.2
        axes.set_ylabel("" if place else "time / time of the first session")
        if place:
            axes.sharey(drawn.axes[0])
        axes.spines[["top", "right"]].set_visible(False)
    known = frame["relative_time"].dropna()
    drawn.axes[0].set_ylim(min(0.95 * known.min(), 0.9), max(1.05 * known.max(), 1.1))
    legend_below(drawn, drawn.axes[0], columns=5)
    return drawn
