"""A table of a page: its columns, which of them are hidden at first, and its rows with the names to filter by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from bench.tell.words import NOTHING


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    title: str
    group: str = ""
    """Columns of one group are shown and hidden together."""
    left: bool = False
    """Holds words, aligned to the left and sorted as words."""
    hidden: bool = False
    heads_row: bool = False
    """Names the row; it stays in view where the page is narrow."""
    kind: str = ""
    """Class of its cells, by which the script finds them."""
    intervals: bool = False
    """Whether some of its cells have an interval after the figure."""


@dataclass(frozen=True)
class Line:
    """A row of a table."""

    cells: Sequence[str]
    names: str
    """What a reader can filter by, in small letters."""
    opens: bool = False
    """Whether a line separates it from the row above."""


@dataclass(frozen=True)
class Table:
    """A table whose columns can be sorted, filtered and hidden."""

    name: str
    columns: Sequence[Column]
    lines: Sequence[Line]

    @classmethod
    def of(cls, name: str, columns: Sequence[Column], lines: Sequence[Line]) -> Table:
        """Make a table without the columns that have nothing in any row."""
        cells = [[line.cells[place] for line in lines] for place in range(len(columns))]
        kept = [place for place, column in enumerate(columns) if column.kind or set(cells[place]) != {NOTHING}]
        shown = [replace(columns[place], intervals=any(" [" in cell for cell in cells[place])) for place in kept]
        return cls(name, shown, [replace(line, cells=[line.cells[place] for place in kept]) for line in lines])


def names(*values: object) -> str:
    """Join what names a row for the filter."""
    return " ".join(str(value) for value in values).lower()


def separated(firsts: Iterable[object]) -> list[bool]:
    """Say for each row whether it begins another group than the row above, given the groups' names."""
    found = list(firsts)
    return [place > 0 and first != found[place - 1] for place, first in enumerate(found)]
