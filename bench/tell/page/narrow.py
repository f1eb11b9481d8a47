"""Where a figure can be cut for a narrow page: into its panels, one below the other, and the entries of its legend."""

from collections.abc import Iterator
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

PADDING = 3.0


class Part(NamedTuple):
    """A rectangle of a figure in points, from its upper left corner, as an SVG's viewBox has it."""

    x: float
    y: float
    width: float
    height: float


def panels(figure: Figure) -> list[list[Part]]:
    """List the panels from the left, each with the labels that it shares with the first; none if there is one alone.

    The layout is settled. A colour scale belongs to the panel on its left.
    """
    columns: list[tuple[Axes, Bbox]] = []
    boxes = [(axes, box) for axes in figure.axes if (box := axes.get_tightbbox()) is not None]
    for axes, box in sorted(boxes, key=lambda found: found[1].x0):
        if columns and (box.x0 < columns[-1][1].x1 - PADDING or box.width < figure.bbox.width / 5):
            columns[-1] = (columns[-1][0], Bbox.union([columns[-1][1], box]))
        else:
            columns.append((axes, box))
    if len(columns) < 2:
        return []
    rows = Bbox.union([box for _, box in columns])
    (first, leftmost), *_ = columns
    labels = Bbox.from_extents(leftmost.x0, rows.y0, first.bbox.x0 - PADDING, rows.y1)
    found = []
    for axes, box in columns:
        own = _part(figure, Bbox.from_extents(box.x0, rows.y0, box.x1, rows.y1))
        labelled = axes is first or any(label.get_text() for label in axes.get_yticklabels())
        found.append([own] if labelled else [_part(figure, labels), own])
    return found


def legend(figure: Figure) -> list[Part]:
    """List the title and the entries of the figure's legend, each a handle and its words."""
    return [_part(figure, box) for box in _entries(figure)]


def _entries(figure: Figure) -> Iterator[Bbox]:
    for own in figure.legends:
        if own.get_title().get_text():
            yield own.get_title().get_window_extent()
        for text in own.get_texts():
            box = text.get_window_extent()
            handle = (own.handlelength + own.handletextpad) * float(text.get_fontsize()) * figure.dpi / 72
            yield Bbox.from_extents(box.x0 - handle, box.y0, box.x1, box.y1)


def _part(figure: Figure, box: Bbox) -> Part:
    points = 72 / figure.dpi
    x, y = box.x0 * points - PADDING, (figure.bbox.height - box.y1) * points - PADDING
    return Part(round(x, 1), round(y, 1), *(round(side * points + 2 * PADDING, 1) for side in (box.width, box.height)))
