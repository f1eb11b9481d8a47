"""The columns of `summary.csv` in their order, as columns.csv beside this file lists them: name, type, unit, meaning.

The table of results/README.md is made of it: after a change run `python -m bench.tell.pages results/README.md`.
"""

import csv
from pathlib import Path
from typing import NamedTuple


class Column(NamedTuple):
    """One column of the summary. What a row leaves out is empty."""

    name: str
    dtype: str
    """Of pandas: `string`, `Int64` or `float64`, each of which has an empty value."""
    unit: str
    meaning: str


with Path(__file__).with_suffix(".csv").open(encoding="utf-8", newline="") as _file:
    COLUMNS: list[Column] = [Column(**row) for row in csv.DictReader(_file)]

NAMES: list[str] = [column.name for column in COLUMNS]
TYPES: dict[str, str] = {column.name: column.dtype for column in COLUMNS}
