"""`kvbench trace --plot`: checks the file, draws the pictures of a trace, and saves them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, FigureBase
from matplotlib.patches import Rectangle

from bench.errors import UsageError
from bench.study.attention_grids import masks, work
from bench.study.trace import Trace
from bench.tell.plots.style import WIDTH_IN, encoded, own_settings
from kvcache.files import write_atomically

Picture = Literal["masks", "work", "shift", "all"]

SUFFIXES = (".png", ".svg", ".pdf")
MOST_TOKENS = 32
"""With more tokens the cells of a grid are too small to see."""
MOST_BOXES = 11
"""Boxes that fit the width of a page."""

_HEIGHTS_IN = {"shift": 2.2, "masks": 8.0, "work": 6.4}


def check(path: Path, picture: Picture) -> Callable[[Trace], None]:
    """Check `path` before anything runs, and return what draws `picture` into it.

    Raises:
        UsageError: the folder does not exist, or the suffix is not one of SUFFIXES.
    """
    if path.suffix not in SUFFIXES:
        raise UsageError(f"--plot {path}: the suffix decides the format; valid: {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise UsageError(f"--plot {path}: the folder {path.parent} does not exist")
    return lambda trace: _save(trace, picture, path)


def draw(trace: Trace, picture: Picture) -> Figure:
    """Draw one picture of `trace`, or all of them below each other.

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


def shift(figure: FigureBase, tokens: Sequence[str]) -> None:
    """Draw a box per token: the text, its input `tokens[:-1]` and its target `tokens[1:]`, padded to one length."""
    shown = [*tokens[: MOST_BOXES - 1], *(["..."] if len(tokens) > MOST_BOXES - 1 else [])]
    rows = {
        "text": shown,
        "input\ntokens[:-1]": [*shown[:-1], "[PAD]"],
        "target\ntokens[1:]": [*shown[1:], "ignored"],
    }
    figure.suptitle(
        "Every position is trained on its next token: input and target are the text, shifted by one", fontsize=11
    )
    axes = figure.add_subplot()
    for line, (name, cells) in enumerate(rows.items()):
        axes.text(-0.7, line, name, ha="right", va="center", fontsize=9)
        for place, token in enumerate(cells):
            padded = line > 0 and place == len(cells) - 1
            face = "#DDDDDD" if padded else ("white", "#DCEBF5", "#FBE3C0")[line]
            edge: dict[str, Any] = {"edgecolor": "#666666", "linewidth": 0.7, "hatch": "...." if padded else None}
            axes.add_patch(Rectangle((place - 0.47, line - 0.26), 0.94, 0.52, facecolor=face, **edge))
            box = {"facecolor": face, "edgecolor": "none", "pad": 1} if padded else None
            axes.text(place, line, token, ha="center", va="center", fontsize=8, bbox=box)
            if line == 1 and not padded:
                axes.annotate(
                    "", (place, 1.72), (place, 1.28), arrowprops={"arrowstyle": "->", "color": "#666666", "lw": 0.9}
                )
    axes.set_xlim(-1.9, len(shown) - 0.4)
    axes.set_ylim(2.4, -0.4)
    axes.axis("off")


def _save(trace: Trace, picture: Picture, path: Path) -> None:
    """Save without dates and random ids: the same trace gives the same bytes, whenever it is drawn."""
    date = {".png": "Software", ".svg": "Date", ".pdf": "CreationDate"}[path.suffix]
    with own_settings(), mpl.rc_context({"svg.hashsalt": "kvbench", "text.parse_math": False}):
        write_atomically(path, encoded(draw(trace, picture), path.suffix, {date: None}))
