"""Pairs of turns of one round -> a ratio with its interval, over rounds or over processes."""

from __future__ import annotations

import pandas as pd

from bench.analysis import estimators, rounds
from bench.analysis.estimators import Ratio


def ratio(above: pd.DataFrame, below: pd.DataFrame, column: str) -> Ratio | None:
    """`column` of `above` / that of `below` over the rounds that both have; None where they share none.

    Both have a row per process and round. From `rounds.MIN_PROCESSES` processes each gives one ratio, and the
    interval is over the processes.
    """
    names = ["process", "round"]
    pairs = above[[*names, column]].merge(below[[*names, column]], on=names, suffixes=("_above", "_below"))
    if pairs.empty:
        return None
    first, second = f"{column}_above", f"{column}_below"
    if pairs["process"].nunique() < rounds.MIN_PROCESSES:
        return estimators.paired_ratio(pairs[first], pairs[second])
    ratios = [estimators.paired_ratio(rows[first], rows[second]).estimate for _, rows in pairs.groupby("process")]
    return estimators.paired_ratio(ratios, [1.0] * len(ratios))
