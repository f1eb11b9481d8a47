"""How every table is laid out: Markdown with pipes, and a terminal's table without a frame."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from tabulate import tabulate


def markdown_table(lines: Iterable[Sequence[str]], headers: Sequence[str], align: Sequence[str] | None = None) -> str:
    """`lines` of cells as Markdown, the cells as they are; `align` says left or right by column (None: all left)."""
    return str(tabulate(list(lines), headers, tablefmt="pipe", colalign=align, disable_numparse=True))


def terminal_table(title: str | None, caption: str | None = None) -> Table:
    """An empty table for a terminal of 100 columns, its title and caption on the left."""
    return Table(
        title=title,
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
        show_edge=False,
        collapse_padding=True,
    )
