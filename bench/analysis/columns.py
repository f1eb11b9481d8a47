"""The columns of `summary.csv` in their order, as columns.csv beside this file lists them: name, type, unit, meaning.

The table of results/README.md is made of it: after a change run `python -m bench.analysis.columns results/README.md`,
which writes the table between its two marks.
"""

import csv
import sys
from pathlib import Path
from typing import NamedTuple

BEGIN, END = "<!-- columns: made by bench/analysis/columns.py -->", "<!-- end of columns -->"
"""What stands before and after the table in results/README.md."""


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


def table() -> str:
    """Make the Markdown table of all columns."""
    lines = [f"| `{column.name}` | {column.unit} | {column.meaning} |\n" for column in COLUMNS]
    return "".join(["| column | unit | meaning |\n", "|---|---|---|\n", *lines])


def with_table(document: str) -> str:
    """Replace what stands between the two marks of `document` by the table.

    Raises:
        ValueError: a mark is missing.
    """
    before, after = document.index(BEGIN) + len(BEGIN), document.index(END)
    return f"{document[:before]}\n{table()}{document[after:]}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")
