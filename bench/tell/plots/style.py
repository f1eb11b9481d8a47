"""What all plots share: size, a marker and line style per strategy that survive grey print, scales, and saving."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import matplotlib as mpl
import msgspec
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from kvcache.arithmetic.costs import Phase
from kvcache.strategies.catalogue import STRATEGIES

WIDTH_IN = 8.0
"""A README column is about 800 pixels wide: 100 pixels to the inch, so that 10 points are 14 pixels."""

TITLE_COLUMNS = 92
"""Characters of the title's size that fit the width."""

PNG_DPI = 150

MAGNITUDE = 8.0
"""Values that differ by a larger factor have a logarithmic axis: from zero, the small ones could not be read."""

PHASES: tuple[Phase, ...] = get_args(Phase)
"""In the order of the panels."""

TITLE = "title"
"""The id of a figure's title in SVG: a page writes it in its own words."""

GUIDE = "#777777"
THOUSANDS = FuncFormatter(lambda value, _: f"{value:,.10g}")


Drawings = dict[str, Callable[[], Figure]]
"""What draws each figure, by file name (without suffix): drawn one by one, where a core is free."""


class Style(msgspec.Struct, frozen=True):
    """How a strategy is drawn. Colours are of Okabe and Ito's palette; marker and line distinguish them without it."""

    color: str
    marker: str
    line: str | tuple[int, tuple[int, ...]]
    hollow: bool = False

    @property
    def curve(self) -> dict[str, Any]:
        """Keyword arguments of `Axes.plot` for a line with markers."""
        marks = {"marker": self.marker, "markersize": 6, "markerfacecolor": "white" if self.hollow else self.color}
        return {"color": self.color, "linestyle": self.line, "linewidth": 1.4, **marks}


_LOOKS = (
    Style("#222222", "o", "-"),
    Style("#0072B2", "s", "--"),
    Style("#E69F00", "^", "-."),
    Style("#D55E00", "v", (0, (6, 1, 1, 1, 1, 1))),
    Style("#009E73", "D", ":", hollow=True),
    Style("#D55E00", "<", (0, (5, 2)), hollow=True),
    Style("#D55E00", ">", (0, (2, 2)), hollow=True),
    Style("#CC79A7", "P", (0, (8, 2))),
    Style("#CC79A7", "p", (0, (2, 1)), hollow=True),
    Style("#56B4E9", "X", (0, (3, 1, 1, 1))),
    Style("#56B4E9", "s", (0, (4, 2)), hollow=True),
    Style("#56B4E9", "^", (0, (1, 1)), hollow=True),
    Style("#56B4E9", "v", (0, (2, 3)), hollow=True),
    Style("#56B4E9", "o", (0, (1, 3)), hollow=True),
    Style("#A08000", "h", (0, (6, 2, 2, 2))),
    Style("#5D3A9B", "*", (0, (7, 1, 1, 1))),
    Style("#0072B2", "8", (0, (1, 4)), hollow=True),
)
_STYLES = dict(zip(STRATEGIES, _LOOKS, strict=False))
"""Those of the catalogue look the same in every plot; kinds of one family have one colour."""
_FURTHER = (
    Style("#882255", "d", (0, (5, 1))),
    Style("#117733", "H", (0, (3, 2, 1, 2))),
    Style("#999933", "P", (0, (1, 2)), hollow=True),
    Style("#332288", "X", (0, (5, 3, 1, 3)), hollow=True),
)


_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5D3A9B", "#222222")


def look(place: int) -> dict[str, Any]:
    """Choose how the place-th run, depth or context is drawn: keyword arguments of `Axes.plot`."""
    line = ("-", "--", "-.", ":")[place % 4]
    return {"color": _COLORS[place % 8], "marker": "osD^vPX*"[place % 8], "linestyle": line}


def styles(strategies: Iterable[str]) -> dict[str, Style]:
    """Choose a style for each strategy, in the order given; a known strategy looks the same in every plot."""
    names = list(dict.fromkeys(strategies))
    unknown = [name for name in names if name not in _STYLES]
    return {name: _STYLES.get(name) or _FURTHER[unknown.index(name) % len(_FURTHER)] for name in names}


@contextmanager
def own_settings() -> Iterator[None]:
    """Draw and save with matplotlib's defaults: a style, font or TeX setting of the user changes no plot."""
    with mpl.rc_context({name: value for name, value in mpl.rcParamsDefault.items() if name != "backend"}):
        yield


def make_figure(title: str, subtitle: str, height_in: float) -> Figure:
    """Make an empty figure of the common width whose title says what is shown, and for which setting."""
    figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
    FigureCanvasAgg(figure)
    lines = [title, *subtitle.splitlines()]
    figure.set_label("\n".join([" ".join(title.split()), *lines[1:]]))  # what a page writes above it
    wrapped = "\n".join(textwrap.fill(line, TITLE_COLUMNS) for line in lines)
    figure.suptitle(wrapped, fontsize=11, parse_math=False, gid=TITLE)  # a folder's name may have two $
    return figure


def panels(figure: Figure, rows: pd.DataFrame) -> Iterator[tuple[int, Phase, Axes, pd.DataFrame]]:
    """Make a panel for each phase that `rows` have, side by side under its name: its number, phase, axes and rows."""
    phases: list[Phase] = [phase for phase in PHASES if (rows["phase"] == phase).any()]
    for number, phase in enumerate(phases):
        axes = figure.add_subplot(1, len(phases), number + 1)
        axes.set_title(phase, fontsize=10)
        yield number, phase, axes, rows[rows["phase"] == phase]


def legend_below(figure: Figure, axes: Axes, columns: int, title: str | None = None) -> None:
    """Put the legend of `axes` below the whole figure where it can hide nothing."""
    handles, labels = axes.get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=columns, title=title, handlelength=3.5)
    legend.set_frame_on(False)


def shifted(lengths: pd.Series[int], place: int, places: int) -> pd.Series[float]:
    """Move context lengths aside by a few percent, so that the intervals of several strategies stand side by side."""
    return lengths.astype("float64").mul(1.06 ** (place - (places - 1) / 2))


def linear_axis(axes: Axes, last: float, label: str) -> None:
    """Make the x axis straight, of positions from zero to the last."""
    axes.set_xlim(0, 1.05 * last)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(THOUSANDS)
    axes.set_xlabel(label)


def context_axis(
    axes: Axes, lengths: pd.Series[int], label: str, most_ticks: int = 6, reach: Iterable[int] = ()
) -> None:
    """Make the x axis logarithmic, of context lengths, with a tick at each; straight where only one was measured.

    `reach` are further positions that are drawn, such as those of the steps after each context.
    """
    ticks, ends = sorted(set(lengths)), [*lengths, *reach]
    if len(ticks) == 1:
        linear_axis(axes, max(reach, default=2 * ticks[0]), label)
        return
    low, high = min(ends) / 1.35, max(ends) * 1.35
    if max(ends) > 2 * ticks[-1]:
        ticks.append(max(ends))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(_apart(ticks, (high / low) ** (1 / most_ticks))))
    axes.xaxis.set_major_formatter(THOUSANDS)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(low, high)
    axes.set_xlabel(f"{label}, log scale")


def value_axis(axes: Axes, values: Iterable[float], label: str, *, from_zero: bool = False) -> None:
    """Make the y axis logarithmic where the values differ by a magnitude, else from zero."""
    known = [value for value in values if value > 0]
    if known and max(known) / min(known) > MAGNITUDE and not from_zero:
        log_axis(axes, "y", known, label)
        return
    if known:
        axes.set_ylim(0, 1.12 * max(known))
    axes.yaxis.set_major_formatter(THOUSANDS)
    axes.set_ylabel(label)
    open_frame(axes, "y")


def log_axis(axes: Axes, side: Literal["x", "y"], values: Iterable[float], label: str) -> None:
    """Make an axis logarithmic, with ticks that leave each other room."""
    known = [value for value in values if value > 0]
    reach, axis = max(known) / min(known), axes.xaxis if side == "x" else axes.yaxis
    few: tuple[float, ...] = (1.0, 3.0) if side == "x" and reach < 1000 else (1.0,)
    axes.set(**{f"{side}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if reach < (50 if side == "x" else 3000) else few))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(THOUSANDS)
    axis.set_label_text(f"{label}, log scale")
    open_frame(axes, side)


def open_frame(axes: Axes, grid: Literal["x", "y"]) -> None:
    """Draw a light grid along the values, behind them, and no frame above and on the right."""
    axes.grid(axis=grid, color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


class Drawn(NamedTuple):
    """A figure in both formats that are written."""

    png: bytes
    svg: str
    """Its words are text, so that one drawing serves the file and the page (`bench.tell.page.svg`)."""


def drawn(figure: Figure) -> Drawn:
    """Draw a figure once for each format; the same figure gives the same bytes, whenever it is drawn.

    `Figure.savefig` draws it twice, first without writing.
    """
    png = io.BytesIO()
    with _at_dpi(figure, PNG_DPI):
        canvas = FigureCanvasAgg(figure)
        # Level 6, the default, takes twice the time for a twentieth of the bytes.
        settings: dict[str, Any] = {"metadata": {"Software": None}, "pil_kwargs": {"compress_level": 3}}
        canvas.print_png(png, **settings)  # type: ignore[no-untyped-call]  # of matplotlib
    figure.set_layout_engine("none")  # it is laid out by now, which takes as long as drawing it
    return Drawn(png.getvalue(), drawn_as_svg(figure))


def drawn_as_svg(figure: Figure) -> str:
    """Draw a figure as SVG alone (`Drawn.svg`); it keeps its layout from then on."""
    svg = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "kvbench", "svg.fonttype": "none"}), _at_dpi(figure, figure.dpi):
        FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None})  # type: ignore[no-untyped-call]  # of matplotlib
    figure.set_layout_engine("none")
    return svg.getvalue()


def write(figure: Drawn, path: Path) -> list[Path]:
    """Write `path` with .png and .svg added."""
    written = [path.with_name(f"{path.name}.{suffix}") for suffix in Drawn._fields]
    written[0].write_bytes(figure.png)
    written[1].write_text(figure.svg, encoding="utf-8")
    return written


def save(figure: Figure, path: Path) -> list[Path]:
    """Draw a figure into `path` with .png and .svg added."""
    return write(drawn(figure), path)


@contextmanager
def _at_dpi(figure: Figure, dpi: float) -> Iterator[None]:
    """Draw at `dpi` in the block, and give the figure its own canvas and resolution back."""
    before, canvas = figure.dpi, figure.canvas
    figure.dpi = dpi
    try:
        yield
    finally:
        figure.dpi = before
        figure.set_canvas(canvas)


def encoded(figure: Figure, suffix: str, metadata: dict[str, Any] | None = None) -> bytes:
    """Return a figure as a file with `suffix` (.png, .svg, .pdf) holds it, for a file that is written whole or not."""
    written = io.BytesIO()
    figure.savefig(written, format=suffix.removeprefix("."), dpi=PNG_DPI, metadata=metadata)
    return written.getvalue()


def _apart(ticks: list[int], room: float) -> list[int]:
    """List the ticks, from the longest down, each by a factor of `room` from the next: space for a label."""
    kept = [ticks[-1]]
    for tick in reversed(ticks):
        if tick * room <= kept[-1]:
            kept.append(tick)
    return kept
