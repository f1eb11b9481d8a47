"""Everything that is derived from a stored run, written beside its samples: tables and plots. Never read back."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from bench import notes, plots, rounds, tables
from bench.case import UsageError
from bench.cautions import cautions
from bench.compare import Comparison
from bench.comparison_plots import comparison_figures
from bench.plot_style import save
from bench.record import Run
from bench.slopes import slopes
from bench.store import write_atomically
from bench.summary import summarize


def write_report(run: Run) -> pd.DataFrame:
    """Draw every table and plot of `run` into its folder; return the summary (one row per case and phase).

    Raises:
        UsageError: the folder cannot be written.
    """
    folder = Path(run.path)
    summary = summarize(run)
    steps = rounds.usable_steps(run)
    fitted = slopes(steps)
    texts = {
        "summary.csv": tables.render(summary, "csv"),
        "summary.json": tables.render(summary, "json"),
        "summary.md": document(run, summary, fitted),
    }
    try:
        for name, text in texts.items():
            write_atomically(folder / name, text.encode())
        _save_all(plots.figures(summary, steps, fitted), folder / "plots")
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written ({error.strerror})") from error
    return summary


def document(run: Run, summary: pd.DataFrame, fitted: pd.DataFrame) -> str:
    """The run as Markdown: the table, the fitted slopes, and what a reader should know before believing it."""
    parts = [
        tables.render(summary, "md"),
        notes.reading_line(summary),
        notes.slope_lines(fitted),
        notes.prediction_lines(summary),
        notes.caution_lines(cautions(run)),
    ]
    return "\n".join(part for part in parts if part)


def write_comparison(comparison: Comparison, b: Run, folder: Path | None) -> Path:
    """Draw the plots of a comparison into `folder`, by default one in B's; return the folder.

    Raises:
        UsageError: the folder cannot be written.
    """
    folder = folder if folder is not None else Path(b.path) / "plots" / f"against-{comparison.a}"
    try:
        _save_all(comparison_figures(comparison.rows, comparison.a, comparison.b), folder)
    except OSError as error:
        raise UsageError(f"--plots {folder}: cannot be written ({error.strerror})") from error
    return folder


def _save_all(figures: dict[str, Figure], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        save(figure, folder / name)
