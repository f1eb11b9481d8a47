"""`kvbench trace --plot`: which picture of a trace goes into which file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, FigureBase

from bench.commands.flags import one
from bench.errors import UsageError
from bench.study.attention_grids import masks, work
from bench.study.shift_picture import shift
from bench.study.trace import Trace
from bench.tell.plots.style import PNG_DPI, WIDTH_IN

Picture = Literal["masks", "work", "shift", "all"]
PICTURES: tuple[Picture, ...] = get_args(Picture)

SUFFIXES = (".png", ".svg", ".pdf")
MOST_TOKENS = 32
"""Beyond it the cells of a grid are too small to be told apart."""

_HEIGHTS_IN = {"shift": 2.2, "masks": 8.0, "work": 6.4}


def check(path: Path | None, picture: str) -> Callable[[Trace], None] | None:
    """What draws `picture` into `path`, checked before anything runs; None where no plot is asked for.

    Raises:
        UsageError: there is no such picture or folder, or the file's suffix is none of SUFFIXES.
    """
    chosen = one("--picture", picture, PICTURES)
    if path is None:
        return None
    if path.suffix not in SUFFIXES:
        raise UsageError(f"--plot {path}: the suffix decides the format; valid: {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise UsageError(f"--plot {path}: the folder {path.parent} does not exist")
    return lambda trace: _save(draw(trace, chosen), path)


def draw(trace: Trace, picture: Picture) -> Figure:
    """The picture of `trace`, or all of them below each other.

    Raises:
        UsageError: the trace has too many tokens for a grid.
    """
    n_steps = max(map(len, trace.steps.values()))
    tokens = [token.strip() or repr(token)[1:-1] for token in trace.tokens]
    if picture != "shift" and len(tokens) > MOST_TOKENS:
        raise UsageError(f"--plot: draws {MOST_TOKENS} tokens at most, the trace has {len(tokens)}; give a smaller -n")
    panels: dict[str, Callable[[FigureBase], None]] = {
        "shift": lambda part: shift(part, tokens),
        "masks": lambda part: masks(part, tokens, trace.n_prompt, max(2, n_steps)),
        "work": lambda part: work(part, trace.n_prompt, n_steps),
    }
    names = list(panels) if picture == "all" else [picture]
    heights = [_HEIGHTS_IN[name] for name in names]
    figure = Figure(figsize=(WIDTH_IN, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    for name, part in zip(
        names, figure.subfigures(len(names), 1, squeeze=False, height_ratios=heights)[:, 0], strict=True
    ):
        panels[name](part)
    return figure


def _save(figure: Figure, path: Path) -> None:
    """The same trace gives the same bytes, whenever it is drawn."""
    dates: dict[str, dict[str, None]] = {
        ".png": {"Software": None},
        ".svg": {"Date": None},
        ".pdf": {"CreationDate": None},
    }
    with mpl.rc_context({"svg.hashsalt": "kvbench"}):
        figure.savefig(path, dpi=PNG_DPI, metadata=dates[path.suffix])
