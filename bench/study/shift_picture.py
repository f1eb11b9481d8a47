"""Input and target of training: the same text, shifted by one. A pure function on token texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import FigureBase
from matplotlib.patches import Rectangle

MOST_TOKENS = 11
"""Boxes that fit the width of a page."""


def shift(figure: FigureBase, tokens: Sequence[str]) -> None:
    """A box per token: the text, its input `tokens[:-1]` and its target `tokens[1:]`, padded to one length."""
    shown = [*tokens[: MOST_TOKENS - 1], *(["..."] if len(tokens) > MOST_TOKENS - 1 else [])]
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
