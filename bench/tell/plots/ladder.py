"""Frames -> figures of steps: down the strategies to the machine's limit, and up the threads. Pure functions."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from bench.naming import context, plural
from bench.tell.drawn import MOST_LINES, few_contexts
from bench.tell.plots.style import (
    GUIDE,
    THOUSANDS,
    legend_below,
    log_axis,
    look,
    make_figure,
    panels,
    styles,
    value_axis,
)
from bench.tell.words import EXTENT, SETTING_COLUMNS, by_setting, catalogue_place, representing, setting
from kvcache.strategies.catalogue import COMPILING, REFEEDING

LIMIT = "limit"


def ladder(summary: pd.DataFrame) -> Figure:
    """Draw each strategy's latency, rung by rung down to the limit (a cached forward's larger floor), per length."""
    words, _ = next(by_setting(summary, also=EXTENT))
    summary = few_contexts(summary, EXTENT, MOST_LINES)
    figure = make_figure("From naive re-feed down to what the machine allows, median", words, 4.4)
    # The yardstick is a cached path like dynamic: below it comes what is faster.
    rungs = sorted(set(summary["strategy"]), key=lambda name: (name in COMPILING, catalogue_place(name)))
    rungs.append(LIMIT)
    contexts = sorted(set(summary["n_prompt"]))
    for panel, phase, axes, rows in panels(figure, summary):
        for place, n_prompt in enumerate(contexts):
            own = rows[rows["n_prompt"] == n_prompt]
            found = own.set_index("strategy")["latency_ms"].to_dict()
            cached = own[~own["strategy"].isin(REFEEDING)]
            found[LIMIT] = cached[["compute_floor_ms", "memory_floor_ms"]].max(axis=1).min()
            shown = [(found[rung], height) for height, rung in enumerate(rungs) if rung in found]
            drawn = look(place)
            label = f"prompt {context(own.iloc[0].to_dict())}"
            axes.plot([x for x, _ in shown], [y for _, y in shown], label=label, linewidth=1.2, **drawn)
        times = [*rows["latency_ms"], *rows[["compute_floor_ms", "memory_floor_ms"]].max(axis=1)]
        log_axis(axes, "x", times, "TTFT (ms)" if phase == "prefill" else "TPOT (ms)")
        axes.yaxis.set_major_locator(FixedLocator(range(len(rungs))))
        axes.set_yticklabels(rungs if panel == 0 else [])
        axes.set_ylim(len(rungs) - 0.6, -0.4)
    legend_below(figure, figure.axes[0], columns=4)
    return figure


def threads(summary: pd.DataFrame) -> Figure:
    """Draw throughput with more threads over that with the fewest, per strategy, at the longest common prompt."""
    counts = summary.groupby("n_prompt")["n_threads"].nunique()
    rows = summary[summary["n_prompt"] == counts[counts == counts.max()].index.max()]
    first = representing(rows)
    words = setting(first, only=[name for name in SETTING_COLUMNS if name != "n_threads"])
    title = "What more threads bring to prefill and to decode"
    figure = make_figure(title, f"{words}, prompt {context(first)}", 4.2)
    fewest = rows["n_threads"].min()
    for _, _, axes, points in panels(figure, rows):
        ideal = np.array(sorted(set(points["n_threads"])), dtype=float)
        gains = [float(ideal[-1] / fewest)]
        axes.plot(ideal, ideal / fewest, color=GUIDE, linewidth=1.2, linestyle=":", label="as many times as threads")
        for strategy, style in styles(points["strategy"]).items():
            own = points[points["strategy"] == strategy].sort_values("n_threads")
            if own["n_threads"].min() == fewest:
                gain = own["tokens_per_s"] / own["tokens_per_s"].iloc[0]
                gains.append(float(gain.max()))
                axes.plot(own["n_threads"].astype(float), gain, label=strategy, **style.curve)
        value_axis(axes, gains, f"throughput / that with {plural(fewest, 'thread')}", from_zero=True)
        axes.xaxis.set_major_locator(FixedLocator(list(ideal)))
        axes.xaxis.set_major_formatter(THOUSANDS)
        axes.set_xlabel("threads")
    legend_below(figure, figure.axes[0], columns=4)
    return figure
