"""How every table is laid out: Markdown with pipes, and a terminal's table that never cuts a number."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text
from tabulate import tabulate

GAP = 2
"""Columns of space between two columns of a terminal's table."""


def markdown_table(lines: Iterable[Sequence[str]], headers: Sequence[str], align: Sequence[str] | None = None) -> str:
    """Write `lines` of cells as Markdown; `align` says left or right by column (None: all left).

    A | in a cell, as in the name of a model, ends no column.
    """
    cells = [[cell.replace("|", r"\|") for cell in line] for line in lines]
    return str(tabulate(cells, headers, tablefmt="pipe", colalign=align, disable_numparse=True))


def terminal_table(title: str | None, caption: str | None = None) -> Table:
    """Make an empty table for a terminal, its title and caption on the left: text, in which nothing is a style."""
    return Table(
        title=Text(title, style="table.title") if title is not None else None,
        title_justify="left",
        caption=Text(caption, style="table.caption") if caption is not None else None,
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
        show_edge=False,
        collapse_padding=True,
    )


@dataclass(frozen=True)
class Fitted:
    """A table that fits any terminal.

    Where it is too wide, in this order: intervals go below their figures, columns that say the same in every row become
    a line below the table, and the rest is split into tables one below the other.
    """

    title: str | None
    headers: Sequence[str]
    lines: Sequence[Sequence[str]]
    left: frozenset[str]
    """Headers of columns that are aligned to the left."""
    names: int
    """So many first columns name the row: they stay, and stand in every part of a table that is split."""
    styles: Sequence[str] = field(default=())
    """Style of the first cell of each line; none where it is empty."""
    sections: bool = False
    """Whether an empty line separates rows whose first cell differs."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Draw the table in the width that there is."""
        width, columns = options.max_width, list(range(len(self.headers)))
        constant: list[int] = []
        if not self._fits(columns, width) and len(self.lines) > 1:
            constant = [column for column in columns[self.names :] if len({line[column] for line in self.lines}) == 1]
            columns = [column for column in columns if column not in constant]
        for number, part in enumerate(self._parts(columns, width)):
            if number:
                yield Text("")
            yield self._drawn(part, width, None if number else self.title)
        shared = {self.headers[column].replace("\n", " "): self.lines[0][column] for column in constant}
        if any(cell != "-" for cell in shared.values()):
            cells = ", ".join(f"{name} {cell}" for name, cell in shared.items() if cell != "-")
            yield Text(f"\nin every row: {cells}\n")

    def _parts(self, columns: list[int], width: int) -> Iterator[list[int]]:
        """List sets of columns that fit; one that alone is too wide stands alone, for the terminal to wrap."""
        names, part = columns[: self.names], list[int]()
        for column in columns[self.names :]:
            if part and not self._fits([*names, *part, column], width):
                yield [*names, *part]
                part = []
            part.append(column)
        yield [*names, *part]

    def _fits(self, columns: list[int], width: int) -> bool:
        return sum(map(self._narrowest, columns)) + GAP * (len(columns) - 1) <= width

    def _widths(self, columns: list[int], width: int) -> dict[int, int]:
        """Narrow the widest columns first, each to the next narrower of its cells and at last to its longest word."""
        widths = {column: max(self._narrowest(column), *map(len, self._cells(column))) for column in columns}
        while sum(widths.values()) + GAP * (len(columns) - 1) > width:
            can = [column for column in columns if widths[column] > self._narrowest(column)]
            if not can:
                break
            column = max(can, key=widths.__getitem__)
            narrower = [len(cell) for cell in self._cells(column) if len(cell) < widths[column]]
            widths[column] = max([*narrower, self._narrowest(column)])
        return widths

    def _drawn(self, columns: list[int], width: int, title: str | None) -> Table:
        table, widths = terminal_table(title), self._widths(columns, width)
        for column in columns:
            justify: JustifyMethod = "left" if self._is_text(column) else "right"
            table.add_column(self.headers[column], justify=justify, width=widths[column])
        for number, line in enumerate(self.lines):
            cells = [
                # An interval goes below its figure where both are too wide; the terminal breaks words by itself.
                cell if self._is_text(column) or len(cell) <= widths[column] else "\n".join(self._pieces(cell, column))
                for column, cell in ((column, line[column]) for column in columns)
            ]
            first = Text(cells[0], style=self.styles[number] if self.styles else "")
            following = self.lines[number + 1][0] if number + 1 < len(self.lines) else line[0]
            table.add_row(first, *map(Text, cells[1:]), end_section=self.sections and following != line[0])
        return table

    def _is_text(self, column: int) -> bool:
        return self.headers[column] in self.left

    def _cells(self, column: int) -> list[str]:
        return [line[column] for line in self.lines]

    def _narrowest(self, column: int) -> int:
        words = (word for cell in self._cells(column) for word in self._pieces(cell, column))
        return max(map(len, [*self.headers[column].split("\n"), *words]))

    def _pieces(self, cell: str, column: int) -> list[str]:
        """List what of a cell stays on one line: a word, a figure, an interval."""
        if self._is_text(column):
            return cell.split()
        figure, bracket, interval = cell.partition(" [")
        return [figure, f"[{interval}"] if bracket else [figure]
