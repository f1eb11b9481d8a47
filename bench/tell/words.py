"""How figures and cases are written in tables and plots: three digits, intervals in brackets, settings in words."""

from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from typing import Any

import pandas as pd

from bench.analysis import frames
from bench.case import HOST_DEVICES
from bench.manifest import ELSEWHERE
from bench.naming import FIELDS, Row, namer
from kvcache.strategies.catalogue import STRATEGIES

SETTING_COLUMNS: list[str] = ["model", "dtype", "device", "n_threads", "attn_implementation", "batch_size"]
"""What the rows of one table and the curves of one plot have in common; it stands in the title."""

EXTENT = ["n_gen", "n_depth"]
PLOT_COLUMNS = [*SETTING_COLUMNS, *EXTENT]
"""What the points of a plot against context length have in common."""

ON_MACHINE = "on_machine"
"""The column that names the machine of rows in their title: one of several of a run, or that of an import."""

NOTHING = "-"


def missing(value: Any) -> bool:
    """Return whether a cell of a frame is empty (None, NaN or NA)."""
    return bool(pd.isna(value))


def number(value: float | None) -> str:
    """Write three significant digits, whole numbers in full: `0.0123`, `39.9`, `183`, `3751`; `-` where there is none.

    >>> [number(value) for value in (0.01234, 1.0, 39.94, 183.4, 3751.2, float("nan"))]
    ['0.0123', '1.00', '39.9', '183', '3751', '-']
    """
    if value is None or missing(value):
        return NOTHING
    if abs(value) >= 1000 or value == 0:
        return f"{value:.0f}"
    return f"{Decimal(f'{value:.2e}'):f}"


def with_interval(value: float | None, low: float | None, high: float | None) -> str:
    """Write a figure and its interval, `39.9 [39.1-41.0]`; without one the figure alone.

    >>> with_interval(39.94, 39.11, 41.02), with_interval(39.94, None, None), with_interval(-1.0, -2.0, 0.5)
    ('39.9 [39.1-41.0]', '39.9', '-1.00 [-2.00 to 0.500]')
    """
    if low is None or high is None or missing(low) or missing(high):
        return number(value)
    between = " to " if low < 0 else "-"
    return f"{number(value)} [{number(low)}{between}{number(high)}]"


def time_ratio(row: Row) -> str:
    """Write the ratio of a comparison's row and its interval, to a thousandth: `0.798 [0.789-0.807]`.

    What a thousandth would hide has three digits: `0.00412 [0.00398-0.00431]`.
    """
    ratio, low, high = (
        number(value) if 0 < value < 0.01 else f"{value:.3f}"  # a NaN is neither
        for value in (row["ratio"], row["ratio_low"], row["ratio_high"])
    )
    return ratio if missing(row["ratio_low"]) else f"{ratio} [{low}-{high}]"


def setting(row: Row, also: Sequence[str] = (), only: Sequence[str] = tuple(SETTING_COLUMNS)) -> str:
    """Write the setting of a row, `smollm2-135m, float32, cpu, 2 threads, sdpa, batch 1`, and the columns `also`.

    Where `only` some of `SETTING_COLUMNS` are the same in all rows, the others are left out. A row may have its
    machine as `ON_MACHINE`, which then stands last. A title of several rows is that of `representing` them.
    """
    shown = set(only) - (set() if row["device"] in HOST_DEVICES else {"n_threads"})
    parts = [FIELDS[name](row[name]) for name in [*SETTING_COLUMNS, "n_gen"] if name in shown or name in also]
    parts += [f"{row['n_depth']} cached before"] if "n_depth" in also and row["n_depth"] else []
    parts += ["prefill quantized"] if row.get("prefill_quantized") else []
    parts += [_where(row[ON_MACHINE])] if ON_MACHINE in row else []
    return ", ".join(parts)


def representing(rows: pd.DataFrame) -> dict[Any, Any]:
    """Return the first row, for a title of all of them: `prefill_quantized` where it is true of any.

    It is no part of a setting, which exact kinds in the same table have too, but without it two runs have one title.
    """
    first: dict[Any, Any] = rows.iloc[0].to_dict()
    return first | {name: bool(rows[name].any()) for name in ("prefill_quantized",) if name in rows}


def _where(machine: str) -> str:
    return machine if machine == ELSEWHERE else f"on {machine}"


def by_setting(frame: pd.DataFrame, also: Sequence[str] = ()) -> Iterator[tuple[str, pd.DataFrame]]:
    """Group the rows that agree in `SETTING_COLUMNS` and `also`, under their title and in the order of the frame.

    Rows of different machines are separate, under titles that name them.
    """
    several = "machine" in frame and len(set(frame["machine"])) > 1
    columns = [*SETTING_COLUMNS, *also, *(["machine"] if several else [])]
    for _, rows in frame.groupby(columns, sort=False):
        row = representing(rows)
        yield setting(row | {ON_MACHINE: row["machine"]} if several else row, also), rows


def case_labels(summary: pd.DataFrame) -> dict[str, str]:
    """Name each case of a run, by its key. `summary` as `summarize` makes it."""
    rows = frames.records(
        summary[["case", "strategy", "n_prompt", "n_depth", *SETTING_COLUMNS, "n_gen", "prefill_quantized"]]
    )
    name = namer(rows)
    return {row["case"]: name(row) for row in rows}


def reason_lines(named: Iterable[tuple[str, str, str]]) -> str:
    """Write a line per lead and reason, of triples of a case's name, lead and reason.

    It names the case that has it, or says how many have it and names one of them as an example.
    """
    alike: dict[tuple[str, str], list[str]] = {}
    for name, lead, reason in named:
        alike.setdefault((lead, reason), []).append(name)
    return "".join(
        f"- {lead}{f'{len(names)} cases, such as ' if len(names) > 1 else ''}{names[0]}: {reason}\n"
        for (lead, reason), names in alike.items()
    )


def catalogue_place(strategy: str) -> int:
    """Find where a strategy stands in the catalogue; one it does not know comes last."""
    names = list(STRATEGIES)
    return names.index(strategy) if strategy in names else len(names)
