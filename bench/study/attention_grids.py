"""Which attention scores are computed: the masks of training, prefill, decode and re-feed; the work step by step.

A cell is one score of one head: the query of its row times the key of its column. Pure functions on token texts.
"""

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from bench.naming import plural
from bench.tell.plots.style import styles, value_axis
from kvcache.strategies.catalogue import PLAIN_CACHE, REFEEDING

N_PADS = 2
"""Padded positions that the picture of the training mask shows."""
MOST_GRIDS = 6
"""Steps that are drawn as grids; the curve below them has all."""

_CELLS: dict[str, dict[str, Any]] = {
    "computed for the first time": {"facecolor": "#0072B2", "edgecolor": "white"},
    "computed again": {"facecolor": "#F6D9A8", "edgecolor": "#A06A00", "hatch": "////"},
    "masked: computed and thrown away": {"facecolor": "white", "edgecolor": "#BBBBBB"},
    "padding": {"facecolor": "#DDDDDD", "edgecolor": "#AAAAAA", "hatch": "...."},
    "not computed: keys and values are in the cache": {"facecolor": "none", "edgecolor": "#777777", "linestyle": ":"},
}
_NEW, _AGAIN, _MASKED, _PADDING, _KEPT = _CELLS

Kind = Callable[[int, int], str | None]
"""From row (query) and column (key) to the kind of a cell; None: nothing is drawn."""


def masks(figure: FigureBase, tokens: Sequence[str], n_prompt: int, step: int) -> None:
    """Draw four grids: training on `tokens`, the prefill of `n_prompt`, and decode T=`step`, cached and naive."""
    n = n_prompt + step - 1
    inputs = [*tokens[:-1], *["[PAD]"] * N_PADS]
    n_inputs = len(inputs) - N_PADS

    def training(query: int, key: int) -> str:
        if max(query, key) >= n_inputs:
            return _PADDING
        return _NEW if key <= query else _MASKED

    figure.suptitle("Who may look at whom: a row is a query, a column a key", fontsize=11)
    (top_left, top_right), (bottom_left, bottom_right) = figure.subplots(2, 2)
    size = len(inputs)
    prefill = f"prefill (T=1): {n_prompt} in, one token out"
    _grid(top_left, inputs, training, size, f"training: all {n_inputs} positions at once, then padding")
    _grid(top_right, tokens[:n_prompt], _causal(n_prompt), size, prefill)
    _grid(bottom_left, tokens[:n], _cached(n, n_prompt), size, f"decode with a cache (T={step}): one row")
    _grid(bottom_right, tokens[:n], _refed(n, n_prompt), size, f"naive re-feed (T={step}): all rows again")
    _legend(figure, _CELLS, columns=2)


def work(figure: FigureBase, n_prompt: int, n_steps: int) -> None:
    """Draw a grid per step, naive above and cached below; under them how many scores each step computes."""
    shown = min(MOST_GRIDS, n_steps)
    figure.suptitle("Attention work of each step: naive re-feed (above) and with a cache (below)", fontsize=11)
    layout = figure.add_gridspec(3, shown, height_ratios=[1, 1, 1.3])
    largest = n_prompt + shown - 1
    for place in range(shown):
        n = n_prompt + place
        for line, kinds in enumerate((_refed, _cached)):
            axes = figure.add_subplot(layout[line, place])
            _grid(axes, [""] * n, kinds(n, n_prompt), largest, f"T={place + 1}" if line == 0 else "")
            computed = n * n if line == 0 or place == 0 else n
            again = n * (n - 1) // 2 if place > 0 else 0
            count = plural(computed, "score")
            axes.set_xlabel(f"{count}\n{again} again" if line == 0 else count, fontsize=9, loc="left")
    axes = figure.add_subplot(layout[2, :])
    steps = range(1, n_steps + 1)
    naive = [(n_prompt + step - 1) ** 2 for step in steps]
    cached = [naive[0], *(n_prompt + step - 1 for step in steps[1:])]
    labels, looks = ("naive re-feed", "with a cache"), styles([*REFEEDING, PLAIN_CACHE]).values()
    for label, look, counts in zip(labels, looks, (naive, cached), strict=True):
        axes.plot(steps, counts, label=label, **look.curve)
    value_axis(axes, [*naive, *cached], "scores per head")
    axes.set_xlabel("step T (T=1 is the prefill)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=9)
    _legend(figure, [_NEW, _AGAIN, _MASKED, _KEPT], columns=2)


def _causal(n: int) -> Kind:
    return lambda query, key: _NEW if key <= query < n else _MASKED


def _refed(n: int, n_prompt: int) -> Kind:
    """Return the kinds of a naive step: only the newest token's row is new, or in the prefill every row."""
    first = n == n_prompt

    def kind(query: int, key: int) -> str:
        if key > query:
            return _MASKED
        return _NEW if first or query == n - 1 else _AGAIN

    return kind


def _cached(n: int, n_prompt: int) -> Kind:
    """Return the kinds of a cached step: one row is computed; those above it were computed in earlier steps."""
    if n == n_prompt:
        return _causal(n)

    def kind(query: int, key: int) -> str | None:
        if query == n - 1:
            return _NEW
        return _KEPT if key <= query else None

    return kind


def _grid(axes: Axes, tokens: Sequence[str], kind: Kind, size: int, title: str) -> None:
    """Draw the cells of `tokens`, so large that `size` of them would fill the grid: one scale for all grids."""
    n = len(tokens)
    for query in range(n):
        for key in range(n):
            cell = kind(query, key)
            if cell is not None:
                axes.add_patch(Rectangle((key - 0.46, query - 0.46), 0.92, 0.92, linewidth=0.6, **_CELLS[cell]))
    axes.set_xlim(-0.55, size - 0.45)
    axes.set_ylim(size - 0.45, -0.55)
    axes.set_aspect("equal")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=8)
    labelled = any(tokens)
    axes.set_xticks(range(n) if labelled else [], tokens if labelled else [], rotation=90)
    axes.set_yticks(range(n) if labelled else [], tokens if labelled else [])
    axes.xaxis.tick_top()
    axes.set_title(title, fontsize=9, loc="left", pad=10 if labelled else 4)


def _legend(figure: FigureBase, kinds: Sequence[str] | dict[str, Any], columns: int) -> None:
    handles = [Patch(label=kind, linewidth=0.6, **_CELLS[kind]) for kind in kinds]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
