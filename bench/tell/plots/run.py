"""The one list of a run's plots: which are drawn, and the names of their files."""

from collections.abc import Callable
from functools import partial

import pandas as pd

from bench.case import HOST_DEVICES
from bench.tell.drawn import MOST_PLOTS, few, few_contexts
from bench.tell.plots import across
from bench.tell.plots.ladder import ladder, threads
from bench.tell.plots.rows import MACHINE_COLUMNS, cached_prefills, is_drawn, rows_roofline
from bench.tell.plots.steps import file_suffix, speedup, step_latency, throughput
from bench.tell.plots.style import Drawings
from bench.tell.plots.waterfall import waterfall, waterfall_cell
from bench.tell.representative import representative
from bench.tell.words import EXTENT, PLOT_COLUMNS, SETTING_COLUMNS, by_setting
from kvcache.strategies.catalogue import REFEEDING


def groups(summary: pd.DataFrame, steps: pd.DataFrame, slopes: pd.DataFrame) -> list[Callable[[], Drawings]]:
    """Return what lists the plots that a run holds the data for, in groups that do not depend on each other.

    Each lists them by file name (without suffix), not yet drawn. `summary` as `summarize`, `steps` as `Tidy.steps`,
    `slopes` as `slopes.slopes` make them, all of one machine.
    """
    timed = summary[summary["latency_ms"].notna()]
    shown = few_contexts(representative(timed), SETTING_COLUMNS)
    return [
        lambda: over_lengths(shown, steps[steps["case"].isin(shown["case"])], slopes),
        lambda: across.figures(timed),
        lambda: against_roofs(timed),
    ]


def over_lengths(timed: pd.DataFrame, steps: pd.DataFrame, slopes: pd.DataFrame) -> Drawings:
    """List step latency, throughput and speed-up of each setting that `timed` has, by file name (without suffix).

    `timed` are the rows of the summary that are drawn, `steps` those of the same cases.
    """
    drawn: Drawings = {}
    for _, rows in few(by_setting(steps), MOST_PLOTS):
        drawn["step_latency" + file_suffix(rows, steps, SETTING_COLUMNS)] = partial(step_latency, rows, slopes, timed)
    for _, rows in few(by_setting(timed, also=EXTENT), MOST_PLOTS):
        suffix = file_suffix(rows, timed, PLOT_COLUMNS)
        drawn["throughput" + suffix] = partial(throughput, rows)
        if (rows["speedup_vs_naive"].notna() & ~rows["strategy"].isin(REFEEDING)).any():
            drawn["speedup" + suffix] = partial(speedup, rows)
    return drawn


def against_roofs(timed: pd.DataFrame) -> Drawings:
    """List rows, waterfall, ladder and threads where the run has their data, by file name (without suffix).

    `timed` are the rows of the summary that have a time.
    """
    known = timed[timed["compute_floor_ms"].notna()]
    drawn: Drawings = {}
    columns = [*MACHINE_COLUMNS, "strategy"]
    prefills = cached_prefills(known)
    enough = (rows for _, rows in prefills.groupby(columns, sort=False) if is_drawn(rows))
    for rows in few(enough, MOST_PLOTS):
        drawn["rows" + file_suffix(rows, prefills, columns)] = partial(rows_roofline, rows)
    shown = representative(known)
    for _, rows in few(by_setting(shown, also=EXTENT), MOST_PLOTS):
        suffix = file_suffix(rows, shown, PLOT_COLUMNS)
        if not waterfall_cell(rows).empty:
            drawn["waterfall" + suffix] = partial(waterfall, rows)
        if len(set(rows["strategy"])) > 1:
            drawn["ladder" + suffix] = partial(ladder, rows)
    columns = [column for column in PLOT_COLUMNS if column != "n_threads"]
    varied = timed[timed.groupby(columns)["n_threads"].transform("nunique") > 1]
    for _, rows in few(varied[varied["device"].isin(HOST_DEVICES)].groupby(columns, sort=False), MOST_PLOTS):
        drawn["threads" + file_suffix(rows, timed, columns)] = partial(threads, rows)
    return drawn
