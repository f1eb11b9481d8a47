"""Everything that is derived from a stored run, written beside its samples: tables, then plots. Never read back."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from bench.analysis.agreement import agreement
from bench.analysis.cautions import Caution, cautions
from bench.analysis.slopes import slopes
from bench.analysis.summary import summarize
from bench.analysis.tidy import Tidy
from bench.judge.compare import Comparison
from bench.record import Run
from bench.store import summary_file
from bench.store.derived import Derived
from bench.store.in_processes import mapped
from bench.tell import notes, tables
from bench.tell.benchmark_json import benchmark_json
from bench.tell.drawn import limits_line
from bench.tell.representative import representative_line
from bench.tell.words import case_labels
from kvcache.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bench.tell.page.svg import Picture
    from bench.tell.plots.style import Drawings


@dataclass(frozen=True, eq=False)
class Report:
    """What is derived from a run, computed once: what the tables, the plots and the terminal show.

    Only what the table needs is computed at first, so that no fault in the rest can cost it.
    """

    tidy: Tidy
    summary: pd.DataFrame
    """One row per case and phase (`bench.analysis.summary.summarize`)."""

    @classmethod
    def of(cls, run: Run) -> Report:
        """Derive the summary of `run`; nothing is written."""
        tidy = Tidy.of(run)
        return cls(tidy=tidy, summary=summarize(tidy))

    @cached_property
    def slopes(self) -> pd.DataFrame:
        """The fitted slope of each curve (`bench.analysis.slopes.slopes`)."""
        return slopes(self.tidy.steps)

    @cached_property
    def cautions(self) -> list[Caution]:
        """What weakens the figures."""
        return cautions(self.tidy, self.summary)

    @cached_property
    def closing(self) -> str:
        """What the run found, in one sentence per setting, each with its line end; empty without naive and a cache."""
        return notes.closing_lines(self.tidy, self.summary)

    @property
    def timed(self) -> pd.DataFrame:
        """The rows of the summary that have a time."""
        return self.summary[self.summary["latency_ms"].notna()]

    @cached_property
    def caution_lines(self) -> str:
        """What a reader should know before believing the run, a line each."""
        return notes.caution_lines(self.cautions, case_labels(self.summary))

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.tidy.run.path)


def write_tables(report: Report) -> Derived:
    """Write summary.csv, .json, .md and benchmark.json into the run's folder; returns what of it failed."""
    failed = Derived()
    texts: dict[str, Callable[[], str]] = {
        "summary.csv": lambda: tables.render(report.summary, "csv"),
        "summary.json": lambda: summary_file.document(report.folder, tables.rows(report.summary)),
        "summary.md": lambda: document(report),
        "benchmark.json": lambda: benchmark_json(report.tidy),
    }
    for name, text in texts.items():
        with failed.trying(name):
            write_atomically(report.folder / name, text().encode())
    return failed


def write_plots(report: Report, derived: Derived) -> dict[str, Picture]:
    """Draw every plot of the run into its folder `plots`, as .png and .svg; `derived` collects what fails.

    Returns them as `write_page` shows them, by name.
    """
    drawings: Drawings = {}
    pictures: dict[str, Picture] = {}
    with derived.trying("plots"):
        # What the processes need is imported before they begin: each would do it again.
        import PIL.Image

        import bench.tell.page.svg  # noqa: F401 - see above
        from bench.tell.plots.machines import groups

        PIL.Image.preinit()
        folder = report.folder / "plots"
        for listed in groups(report.summary, report.tidy.steps, report.slopes, agreement(report.tidy.run)):
            with derived.trying("plots"):
                drawings |= listed()
        folder.mkdir(parents=True, exist_ok=True)
        # Drawing is most of a report's time, and no figure needs another.
        rendered = mapped(partial(_rendered, folder), list(drawings.items()), fewest=1)
        for name, (shown, failed) in zip(drawings, rendered, strict=True):
            derived.add(failed)
            if shown is not None:
                pictures[name] = shown
    return pictures


def _rendered(folder: Path, named: tuple[str, Callable[[], Figure]]) -> tuple[Picture | None, Derived]:
    """Draw and save a figure, and return it as a page shows it; and what of it failed."""
    from bench.tell.page.svg import picture
    from bench.tell.plots.style import drawn, own_settings, write

    name, draw = named
    what, shown, failed = f"{folder.name}/{name}", None, Derived()
    with failed.trying(what), own_settings():
        figure = draw()
        made = drawn(figure)
        with failed.trying(what):  # one that cannot be written is on the page all the same
            write(made, folder / name)
        shown = picture(figure, name, made.svg)
    return shown, failed


def write_page(report: Report, pictures: Mapping[str, Picture], file: Path, derived: Derived) -> None:
    """Write the run as one HTML file; `derived` collects what fails."""
    with derived.trying(file.name if file.parent == report.folder else str(file)):
        from bench.tell.page.run import run_page

        write_atomically(file, run_page(report, pictures).encode())


def document(report: Report) -> str:
    """Write the run as Markdown: the table, the fitted slopes, and what a reader should know before believing it."""
    parts = [
        tables.render(report.summary, "md"),
        notes.reading_line(report.summary),
        notes.slope_lines(report.slopes),
        notes.prediction_lines(report.summary),
        representative_line(report.timed),
        limits_line(report.timed),
        report.caution_lines,
        report.closing,
    ]
    return "\n".join(part for part in parts if part)


def write_comparison(comparison: Comparison, b: Run, folder: Path | None, derived: Derived) -> Path | None:
    """Draw the plots of a comparison into `folder`, by default one in B's; return it, or None without rows.

    `derived` collects what fails.
    """
    if comparison.rows.empty:
        return None
    folder = folder if folder is not None else Path(b.path) / "plots" / f"against-{comparison.a}"
    with derived.trying(f"plots in {folder}"):
        from bench.tell.plots.comparison import comparison_figures

        save_all(lambda: comparison_figures(comparison.rows, *comparison.labels), folder, derived)
    return folder


def append_step_summary(markdown: str) -> None:
    """Add `markdown` to the summary page of a GitHub workflow's job; nothing where `$GITHUB_STEP_SUMMARY` is not set.

    Raises:
        OSError: the file that the variable names cannot be written.
    """
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if path:
        with open(path, "a", encoding="utf-8", opener=_at_once) as file:
            file.write(f"{markdown}\n")


def _at_once(path: str, flags: int) -> int:
    """Open a file; a pipe that nobody reads is an error, and not waited for."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)


def save_all(draw: Callable[[], dict[str, Figure]], folder: Path, derived: Derived) -> None:
    """Draw with matplotlib's own settings and save each figure; one that fails costs no other."""
    from bench.tell.plots.style import own_settings, save

    with own_settings():
        figures = draw()
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            with derived.trying(f"{folder.name}/{name}"):
                save(figure, folder / name)
