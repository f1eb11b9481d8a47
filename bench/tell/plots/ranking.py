"""Frames -> figures of a ranking: a line per case, a marker per run."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.judge.ranking import BASELINE, RATIO_COLUMNS, TIME_COLUMNS, Ranking
from bench.naming import Row, context
from bench.tell.drawn import MOST_CASES, MOST_PLOTS, few
from bench.tell.plots import style as drawing
from bench.tell.plots.comparison import ratio_axis
from bench.tell.plots.steps import file_suffix, intervals
from bench.tell.ranking import by_shared_setting
from bench.tell.words import SETTING_COLUMNS

LINE_IN = 0.13
"""Height of a marker. A case has one for each run, and half of one between it and the next."""


def ranking_figures(ranking: Ranking, rows: pd.DataFrame, baseline: int = 0) -> dict[str, Figure]:
    """Draw one picture of each setting that the runs share, by file name; `rows` as `Ranking.against` makes them."""
    columns = [name for name in [*SETTING_COLUMNS, "n_gen"] if name not in ranking.apart]
    return {
        "ranking" + file_suffix(own, rows, columns): picture_of(ranking, title, own, baseline)
        for title, own in few(by_shared_setting(ranking, rows), MOST_PLOTS)
    }


def picture_of(ranking: Ranking, title: str, rows: pd.DataFrame, baseline: int = 0) -> Figure:
    """Draw a panel per phase, in it a line per case, and on it a marker per run with its 95 % interval.

    Ratios to the baseline where every row has one; else, since some have no counterpart in it, the times themselves.
    `rows` are of one setting; of many cases some are drawn, evenly spread.
    """
    groups = list(dict.fromkeys(rows["group"]))
    rows = rows[rows["group"].isin(few(groups, MOST_CASES))]
    some = f"\n{MOST_CASES} of {len(groups):,} cases, evenly spread" if len(groups) > MOST_CASES else ""
    own = ranking.letters[baseline]
    by_ratio = bool(rows["ratio"].notna().all())
    columns = RATIO_COLUMNS if by_ratio else TIME_COLUMNS
    drawn = rows[rows["verdict"] != BASELINE] if by_ratio else rows
    runs = [letter for letter in ranking.letters if (drawn["run"] == letter).any()]
    what = f"Time of each run / time of {own}, unpaired," if by_ratio else "Time of each run, median"
    names = (f"{letter}: {tidy.run.label}" for letter, tidy in zip(ranking.letters, ranking.tidies, strict=True))
    labels = _labels(ranking, rows)
    cases = list(dict.fromkeys(labels.values()))
    height = 1.9 + LINE_IN * (len(runs) + 0.6) * len(cases)
    subtitle = f"{title}\n{'   '.join(names)}{some}"
    figure = drawing.make_figure(f"{what} {intervals(drawn[columns[1]], drawn['verdict'])}", subtitle, height)
    for panel, phase, axes, shown in drawing.panels(figure, drawn):
        for place, run in enumerate(runs):
            of_run = shown[shown["run"] == run]
            # The markers of a case stand within 0.7 of its height, around its label.
            heights = of_run["group"].map(labels).map(cases.index) + 0.7 * ((place + 0.5) / len(runs) - 0.5)
            _markers(axes, of_run, heights, columns, drawing.look(ranking.letters.index(run)))
        axes.set_yticks(range(len(cases)), [label for label, _ in cases] if panel == 0 else [""] * len(cases))
        axes.set_ylim(len(cases) - 0.4, -0.6)
        if by_ratio:
            axes.axvline(1, color=drawing.GUIDE, linewidth=1.2, zorder=1)
            ratio_axis(axes, shown, f"faster  <  {phase}, time / {own}'s  >  slower")
        else:
            drawing.log_axis(axes, "x", shown["ms"], f"{phase} (ms)")
    drawing.legend_below(figure, figure.axes[0], columns=8)
    return figure


def _labels(ranking: Ranking, rows: pd.DataFrame) -> dict[str, tuple[str, int]]:
    """Give each group of a ranking the label of its line, and the seed; groups of two phases may have the same line.

    Beside an import's generation, whose context is no prompt, that of the other runs names the group.
    """
    by_length = rows.sort_values("n_prompt", kind="stable").to_dict("records")
    labels = {row["group"]: (_label(ranking, row), row["seed"]) for row in by_length}
    return {group: labels[group] for group in dict.fromkeys(rows["group"])}


def _label(ranking: Ranking, row: Row) -> str:
    """Name a case by what it has in every run."""
    return " ".join(([] if "strategy" in ranking.apart else [f"{row['strategy']},"]) + [f"prompt {context(row)}"])


def _markers(
    axes: Axes, rows: pd.DataFrame, heights: pd.Series[float], columns: list[str], drawn: dict[str, Any]
) -> None:
    value, low, high = columns
    axes.hlines(heights, rows[low], rows[high], color=drawn["color"], linewidth=1.4)
    label = rows["run"].iloc[0] if len(rows) else None
    axes.plot(rows[value], heights, markersize=4.5, label=label, **{**drawn, "linestyle": "none"})
