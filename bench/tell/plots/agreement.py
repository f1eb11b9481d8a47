"""Frame -> figure: does a lossy kind of cache get worse the further it decodes from what was prefilled?"""

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.naming import context
from bench.tell.plots.style import legend_below, look, make_figure, open_frame
from bench.tell.words import representing, setting

STRETCH = 16
"""Decode steps that make one point: of a single sequence each step either agrees or not."""

COLUMNS = 4
"""Panels side by side."""


def agreement_by_position(rows: pd.DataFrame) -> Figure:
    """Draw the share of positions that agree with the exact run, a panel per strategy and a line per context.

    `rows` as `bench.analysis.agreement` makes them, of one setting. A point is the mean of `STRETCH` decode steps.
    """
    names = list(dict.fromkeys(rows["strategy"]))
    lengths = dict.fromkeys(map(context, rows.to_dict("records")))
    looks = {length: look(place) for place, length in enumerate(lengths)}
    n_bands = -(-len(names) // COLUMNS)
    title = f"Agreement with the exact run's most likely token, mean of {STRETCH} decode steps"
    figure = make_figure(title, setting(representing(rows)), 1.5 + 2.0 * n_bands)
    grid = figure.subplots(n_bands, min(COLUMNS, len(names)), sharex=True, sharey=True, squeeze=False)
    for place, (name, axes) in enumerate(zip(names, grid.flat, strict=False)):
        own = rows[rows["strategy"] == name]
        _panel(axes, own, looks)
        means = [f"{agreement:.2f}" for agreement in own.groupby("case", sort=False)["agreement"].mean()]
        axes.set_title(f"{name}\nmean {', '.join(means)}", fontsize=9)
        if place % COLUMNS == 0:
            axes.set_ylabel("top-1 agreement", fontsize=9)
        if place + COLUMNS >= len(names):  # nothing stands below it
            axes.set_xlabel("steps after the context", fontsize=9)
            axes.tick_params(labelbottom=True)
    for axes in grid.flat[len(names) :]:
        axes.set_axis_off()
    grid[0, 0].set_ylim(0, 1.05)
    grid[0, 0].set_xlim(0, rows["step"].max() * 1.03)
    for length, drawn in looks.items():
        grid[0, 0].plot([], [], label=length, **drawn)
    legend_below(figure, grid[0, 0], columns=5, title="context: prompt @ depth")
    return figure


def _panel(axes: Axes, rows: pd.DataFrame, looks: dict[str, dict[str, Any]]) -> None:
    """Draw a line per context."""
    for _, own in rows.groupby("case", sort=False):
        stretches = own.groupby((own["step"] - 1) // STRETCH)[["step", "agreement"]].mean()
        axes.plot(stretches["step"], stretches["agreement"], markersize=4, **looks[context(own.iloc[0].to_dict())])
    open_frame(axes, "y")
