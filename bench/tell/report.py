"""Everything that is derived from a stored run, written beside its samples: tables and plots. Never read back."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from bench.analysis import roofline, rounds
from bench.analysis.cautions import cautions
from bench.analysis.slopes import slopes
from bench.analysis.summary import summarize
from bench.errors import UsageError
from bench.judge.compare import Comparison
from bench.record import Run
from bench.store.sealed import write_atomically
from bench.tell import notes, tables
from bench.tell.benchmark_json import benchmark_json
from bench.tell.plots import rows
from bench.tell.plots import steps as step_plots
from bench.tell.plots.comparison import comparison_figures
from bench.tell.plots.style import save


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
        "benchmark.json": benchmark_json(run),
    }
    try:
        for name, text in texts.items():
            write_atomically(folder / name, text.encode())
        figures = step_plots.figures(summary, steps, fitted)
        figures |= rows.figures(roofline.with_floors(run, summary))
        _save_all(figures, folder / "plots")
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


def write_comparison(comparison: Comparison, b: Run, folder: Path | None) -> Path | None:
    """Draw the plots of a comparison into `folder`, by default one in B's; return it, or None without rows.

    Raises:
        UsageError: the folder cannot be written.
    """
    if comparison.rows.empty:
        return None
    folder = folder if folder is not None else Path(b.path) / "plots" / f"against-{comparison.a}"
    try:
        _save_all(comparison_figures(comparison.rows, comparison.a, comparison.b), folder)
    except OSError as error:
        raise UsageError(f"--plots {folder}: cannot be written ({error.strerror})") from error
    return folder


def append_step_summary(markdown: str) -> None:
    """Add `markdown` to the summary page of a GitHub workflow's job; nothing where `$GITHUB_STEP_SUMMARY` is not set.

    Raises:
        UsageError: the file that the variable names cannot be written.
    """
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if path:
        try:
            with Path(path).open("a", encoding="utf-8") as file:
                file.write(f"{markdown}\n")
        except OSError as error:
            raise UsageError(f"GITHUB_STEP_SUMMARY={path}: cannot be written ({error.strerror})") from error


def _save_all(figures: dict[str, Figure], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        save(figure, folder / name)
