"""Frame -> figure: latency over months, a panel for each of the cases measured most often, a line per machine."""

import textwrap
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure

from bench.naming import context, plural
from bench.tell.plots.style import GUIDE, legend_below, look, make_figure, value_axis
from bench.tell.words import SETTING_COLUMNS, setting

MOST_PANELS = 6
MANY = 200
"""Runs of a machine that are drawn as dots alone."""
NAMED_AT = {"torch": 1.0, "transformers": 0.9}
"""At which height a change is named, where the last one is further away than `CROWDED` of the width."""
CROWDED = 0.18
PANEL_TITLE_COLUMNS = 110
"""Characters of a panel's title that fit its width."""
MARKED = {"torch": "-", "transformers": "--", "commit": ":"}
"""What is marked where it changes between two runs of a machine, and the line."""


def trends(rows: pd.DataFrame, alike: list[str]) -> Figure:
    """Draw latency with its interval against the time of the run, for each case (columns `alike`) and phase.

    Of more than `MOST_PANELS` those with the most runs are drawn, which the subtitle says.
    """
    groups = sorted(rows.groupby([*alike, "phase"], sort=False), key=lambda group: -len(group[1]))
    shown = [own for _, own in groups[:MOST_PANELS]]
    more = (
        f"; {len(shown)} of {plural(len(groups), 'case and phase', 'cases and phases')}, those with most runs"
        if len(groups) > len(shown)
        else ""
    )
    drawn = pd.concat(shown)
    machines = list(dict.fromkeys(drawn["machine"]))
    runs = drawn["measured_utc"].nunique()
    title = "Latency over time, median with 95 % intervals"
    figure = make_figure(
        title, f"{plural(runs, 'run')}, {plural(len(machines), 'machine')}{more}", 1.4 + 2.0 * len(shown)
    )
    grid = figure.subplots(len(shown), 1, sharex=True, squeeze=False)
    setups = [set(own["setup"].iloc[0].split(" ")) for own in shown]
    for own, axes in zip(shown, grid[:, 0], strict=True):
        _panel(axes, own, machines, set.intersection(*setups))
    dates = AutoDateLocator(minticks=3, maxticks=7)  # type: ignore[no-untyped-call]
    grid[-1][0].xaxis.set_major_locator(dates)
    grid[-1][0].xaxis.set_major_formatter(ConciseDateFormatter(dates))  # type: ignore[no-untyped-call]
    first = grid[0][0]
    for name, line in MARKED.items():
        if not any(_changes(own, name).any() for one in shown for _, own in one.groupby("machine")):
            continue  # no line in any panel
        first.plot([], [], color=GUIDE, linewidth=1, linestyle=line, label=f"another {name}")
    legend_below(figure, first, columns=3)
    return figure


def _changes(rows: pd.DataFrame, name: str) -> "pd.Series[bool]":
    """Mark the runs of one machine before which `name` had another value."""
    before = rows[name].shift()
    return rows[name].ne(before) & rows[name].notna() & before.notna()


def _panel(axes: Axes, rows: pd.DataFrame, machines: list[str], shared: set[str]) -> None:
    """Draw a case and phase; of its setup its title has what is not `shared` by all panels."""
    named: dict[str, list[pd.Timestamp]] = {name: [] for name in NAMED_AT}
    near = CROWDED * (rows["measured_utc"].max() - rows["measured_utc"].min())
    for place, machine in enumerate(machines):
        own = rows[rows["machine"] == machine]
        drawn: dict[str, Any] = look(place)
        many = len(own) > MANY  # whose line and intervals would be a band
        sizes = {"markersize": 1.5, "linestyle": "none"} if many else {"markersize": 4, "linewidth": 1.2}
        axes.plot(own["measured_utc"], own["latency_ms"], **drawn | sizes)
        axes.plot([], [], label=machine, linewidth=1.2, markersize=4, **drawn)
        ends = own["measured_utc"], own["latency_ms_low"], own["latency_ms_high"]
        axes.vlines(*ends, color=drawn["color"], linewidth=1.2, alpha=0.1 if many else 1.0)
        for name, line in MARKED.items():
            for when, value in own.loc[_changes(own, name), ["measured_utc", name]].itertuples(index=False):
                axes.axvline(when, color=GUIDE, linewidth=0.9, linestyle=line, zorder=1)
                if name in NAMED_AT and all(abs(when - other) > near for other in named[name]):
                    named[name].append(when)
                    at = when, NAMED_AT[name]
                    axes.annotate(
                        f" {name} {value}", at, xycoords=("data", "axes fraction"), va="top", fontsize=7.5, color=GUIDE
                    )
    first = rows.iloc[0].to_dict()
    words = f"{first['strategy']} {first['phase']}, prompt {context(first)}, {setting(first, only=SETTING_COLUMNS)}"
    apart = [word for word in first["setup"].split(" ") if word not in shared]
    axes.set_title(textwrap.fill(", ".join([words, *filter(None, apart)]), PANEL_TITLE_COLUMNS), fontsize=9)
    value_axis(axes, [*rows["latency_ms"], *rows["latency_ms_high"].dropna()], "ms")
