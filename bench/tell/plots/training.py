"""The loss of a training as a figure."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bench.tell.plots.style import GUIDE, THOUSANDS, make_figure, open_frame


def loss_curve(losses: Sequence[tuple[int, float]], entropy: float, setting: str) -> Figure:
    """Draw the mean loss against the step, and the text's own entropy, the lowest loss that any model can reach.

    Args:
        losses: (step, mean loss in nats per target), in order.
        entropy: in nats per target.
        setting: what was trained, for the subtitle.
    """
    figure = make_figure("Training loss: every position predicts its next token", setting, 3.6)
    axes = figure.add_subplot()
    steps, values = zip(*losses, strict=True) if losses else ((), ())
    axes.plot(steps, values, color="#0072B2", linewidth=1.4, label="mean loss")
    axes.axhline(entropy, color=GUIDE, linewidth=1.2, linestyle="--", zorder=1)
    axes.annotate(
        f"the text's own entropy, {entropy:.3f}",
        (1, entropy),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 5),
        textcoords="offset points",
        ha="right",
        fontsize=9,
    )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per target)")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.08 * max([entropy, *values]))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(THOUSANDS)
    open_frame(axes, "y")
    return figure
