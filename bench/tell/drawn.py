"""How much of a large run its pictures draw: what more lines, dots and files would make unreadable has the tables."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import pandas as pd

from bench.naming import plural
from bench.tell.representative import representative
from bench.tell.words import EXTENT, SETTING_COLUMNS, by_setting

T = TypeVar("T")

MOST_PLOTS = 8
"""Plots of one kind and machine, and machines: a run of more settings or machines draws some of them."""
MOST_CONTEXTS = 40
"""Context lengths of a curve: with more its markers and intervals hide each other."""
MOST_LINES = 12
"""Lines of one plot that a legend names one by one."""
MOST_CASES = 60
"""Lines of a plot with a line per case, which grows taller with each."""
MOST_PAGE_CASES = 2000
"""Rows of the table of a run's page, which then has some 7 MB: few enough to sort in a browser, and to mail."""
MOST_DOTS = 500
"""Decode steps of a strategy that are drawn as dots."""


def few(items: Iterable[T], most: int) -> list[T]:
    """Take at most so many items, evenly spread, the first and the last among them.

    >>> few("abcdefg", 3), few("ab", 3)
    (['a', 'd', 'g'], ['a', 'b'])
    """
    found = list(items)
    if len(found) <= most:
        return found
    return [found[round(place * (len(found) - 1) / (most - 1))] for place in range(most)]


def few_contexts(rows: pd.DataFrame, columns: Sequence[str], most: int = MOST_CONTEXTS) -> pd.DataFrame:
    """Keep the rows of at most so many context lengths in each group of `columns`, evenly spread on a log scale."""
    if rows.empty:
        return rows
    lengths = rows["n_depth"] + rows["n_prompt"]
    kept = [
        own[lengths[own.index].isin(_spread(sorted(set(lengths[own.index])), most))]
        for _, own in rows.groupby(list(columns), sort=False)
    ]
    return pd.concat(kept).sort_index()


def limits_line(timed: pd.DataFrame) -> str:
    """Say in one line how much of the run the plots leave out; nothing where they draw all.

    `timed` are the rows of the summary that have a time.
    """
    rows = representative(timed)
    parts = []
    machines = [own for _, own in rows.groupby("machine", sort=False)]
    if len(machines) > MOST_PLOTS:
        parts.append(f"{MOST_PLOTS} of {plural(len(machines), 'machine')}")
    n_settings = max((sum(1 for _ in by_setting(own, also=EXTENT)) for own in machines), default=0)
    if n_settings > MOST_PLOTS:
        parts.append(f"{MOST_PLOTS} of {plural(n_settings, 'setting')}{' of a machine' if len(machines) > 1 else ''}")
    n_lengths = max((_count_lengths(own) for _, own in rows.groupby([*SETTING_COLUMNS, "machine"])), default=0)
    if n_lengths > MOST_CONTEXTS:
        parts.append(f"at most {MOST_CONTEXTS} of {n_lengths:,} context lengths")
    return f"The plots draw {' and '.join(parts)}, evenly spread; the tables have all.\n" if parts else ""


def page_line(n_cases: int) -> str:
    """Say in one line that a run's page leaves cases out; nothing where it has all."""
    if n_cases <= MOST_PAGE_CASES:
        return ""
    return f"The page has {MOST_PAGE_CASES:,} of {n_cases:,} cases, evenly spread; summary.csv has all.\n"


def cases_line(n_cases: int) -> str:
    """Say in one line that the plots of a comparison leave cases out; nothing where they draw all."""
    if n_cases <= MOST_CASES:
        return ""
    return f"The plots draw at most {MOST_CASES} of {n_cases:,} cases and phases; the table has all.\n"


def _count_lengths(rows: pd.DataFrame) -> int:
    return int((rows["n_depth"] + rows["n_prompt"]).nunique())


def _spread(lengths: Sequence[int], most: int) -> set[Any]:
    """Take the lengths nearest to `most` places that are evenly spread on a log scale."""
    if len(lengths) <= most:
        return set(lengths)
    first, last = math.log(lengths[0]), math.log(lengths[-1])
    places = (first + (last - first) * place / (most - 1) for place in range(most))
    return {min(lengths, key=lambda length: abs(math.log(length) - place)) for place in places}
