"""Which rows of a run its plots against context length draw, where a setting varies that has a plot across it."""

from typing import Any

import pandas as pd

from bench.tell.words import EXTENT, SETTING_COLUMNS

PLOT_ACROSS: dict[str, str] = {"batch_size": "across-batch", "dtype": "across-dtype", "n_gen": "across-n_gen"}
"""Settings whose values one plot compares, and its file name: the plots against context length draw the first value."""


def representative(timed: pd.DataFrame) -> pd.DataFrame:
    """Take the rows of the first value of each setting that is compared across its values, by machine and model.

    `timed` are the rows of `summarize` that have a time. A value without a counterpart at the same lengths stays.
    """
    kept = []
    for _, rows in timed.groupby(["machine", "model"], sort=False):
        for column, value in _first_values(rows).items():
            rows = rows[rows[column] == value]  # noqa: PLW2901  # narrowed setting by setting
        kept.append(rows)
    return pd.concat(kept) if kept else timed


def representative_line(timed: pd.DataFrame) -> str:
    """Say in one line what the plots against context length leave out, and where it is drawn; else nothing."""
    found: dict[str, list[str]] = {}
    for _, rows in timed.groupby(["machine", "model"], sort=False):
        for column, value in _first_values(rows).items():
            found.setdefault(column, []).append(str(value))
    if not found:
        return ""
    values = " and ".join(
        f"{column.replace('_', ' ')} {' or '.join(dict.fromkeys(firsts))}" for column, firsts in found.items()
    )
    if any(len(set(firsts)) > 1 for firsts in found.values()):
        values += " (each model's first)"
    plots = " and ".join(f"plots/{PLOT_ACROSS[column]}*" for column in found)
    return f"The plots against context length draw {values} alone; the values are compared in {plots}.\n"


def _first_values(rows: pd.DataFrame) -> dict[str, Any]:
    """Find the first value of each setting of which some cases that are alike in all else have several."""
    alike = [*SETTING_COLUMNS, *EXTENT, "n_prompt", "strategy", "phase"]
    several = {}
    for column in PLOT_ACROSS:
        others = [name for name in alike if name != column]
        if rows.drop_duplicates([*others, column]).duplicated(others).any():
            several[column] = rows[column].iloc[0]
    return several
