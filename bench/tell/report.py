"""Everything that is derived from a stored run, written beside its samples: tables, then plots. Never read back."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from bench.analysis.cautions import Caution, cautions
from bench.analysis.slopes import slopes
from bench.analysis.summary import summarize
from bench.analysis.tidy import Tidy
from bench.errors import UsageError
from bench.judge.compare import Comparison
from bench.record import Run
from bench.store.sealed import write_atomically
from bench.tell import notes, tables
from bench.tell.benchmark_json import benchmark_json
from bench.tell.plots.comparison import comparison_figures
from bench.tell.plots.run import figures
from bench.tell.plots.style import save
from bench.tell.words import case_labels


@dataclass(frozen=True, eq=False)
class Report:
    """What is derived from a run, computed once: what the tables, the plots and the terminal show."""

    tidy: Tidy
    summary: pd.DataFrame
    """One row per case and phase (`bench.analysis.summary.summarize`)."""
    slopes: pd.DataFrame
    cautions: list[Caution]

    @classmethod
    def of(cls, run: Run) -> Report:
        """Derive everything from `run`; nothing is written."""
        tidy = Tidy.of(run)
        summary = summarize(tidy)
        return cls(tidy=tidy, summary=summary, slopes=slopes(tidy.steps), cautions=cautions(tidy, summary))

    @property
    def closing(self) -> str:
        """What the run found, in one sentence per setting, each with its line end; empty without naive and a cache."""
        return notes.closing_lines(self.tidy, self.summary)

    @property
    def caution_lines(self) -> str:
        """What a reader should know before believing the run, a line each."""
        return notes.caution_lines(self.cautions, case_labels(self.summary))

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.tidy.run.path)


def write_tables(report: Report) -> None:
    """Write summary.csv, .json, .md and benchmark.json into the run's folder.

    Raises:
        UsageError: the folder cannot be written.
    """
    texts = {
        "summary.csv": tables.render(report.summary, "csv"),
        "summary.json": tables.render(report.summary, "json"),
        "summary.md": document(report),
        "benchmark.json": benchmark_json(report.tidy),
    }
    try:
        for name, text in texts.items():
            write_atomically(report.folder / name, text.encode())
    except OSError as error:
        raise UsageError(f"{report.folder}: cannot be written ({error.strerror})") from error


def write_plots(report: Report) -> None:
    """Draw every plot of the run into the folder `plots` in its own, as .png and .svg.

    Raises:
        UsageError: the folder cannot be written.
    """
    try:
        _save_all(figures(report.summary, report.tidy.steps, report.slopes), report.folder / "plots")
    except OSError as error:
        raise UsageError(f"{report.folder}: cannot be written ({error.strerror})") from error


def document(report: Report) -> str:
    """Write the run as Markdown: the table, the fitted slopes, and what a reader should know before believing it."""
    parts = [
        tables.render(report.summary, "md"),
        notes.reading_line(report.summary),
        notes.slope_lines(report.slopes),
        notes.prediction_lines(report.summary),
        report.caution_lines,
        report.closing,
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
