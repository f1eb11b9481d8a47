"""Printing: a document on stdout, all else on stderr; and leaving with the exit code that the results ask for."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer

from bench.errors import FailedRun, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from bench.judge.verdict import Verdict
    from bench.measure.run import Job
    from bench.record import Run
    from bench.tell.formats import DocumentFormat, Format
    from bench.tell.verdicts import Command


LEAST_COLUMNS = 40
"""Of a terminal: one that is narrower, or says so because nobody set its size, wraps lines and loses no figure."""


def terminal() -> Console:
    """Return stdout as a terminal."""
    from rich.console import Console

    console = Console()
    console.width = max(console.width, LEAST_COLUMNS)
    return console


def emit(text: str) -> None:
    """Write to stdout; a write that fails is reported at the end (streams.py)."""
    print(text, end="", flush=True)


def note(*lines: str) -> None:
    """Write lines to stderr: progress, advice, the path of what was written."""
    for line in lines:
        print(line, file=sys.stderr, flush=True)


def ask(question: str) -> bool:
    """Ask on the terminal; no, where there is none or the answer is Ctrl-C."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    try:
        return typer.confirm(question, err=True)
    except typer.Abort:
        return False


def print_summary(run: Run, form: Format, html: Path | None = None) -> None:
    """Print the summary of a run, then write its tables, draw its plots and write its page, also to `html`.

    Files that cannot be written are named. The path of the run folder is the very last line: on stdout with `md`, on
    stderr with the other formats.

    Raises:
        typer.Exit: a case failed, or every case is unsupported (exit code 5); `html` cannot be written (2).
    """
    from bench.record import FAULTS
    from bench.store.derived import Derived
    from bench.store.in_processes import beside
    from bench.tell import notes, tables
    from bench.tell.drawn import limits_line, page_line
    from bench.tell.report import Report, write_page, write_plots, write_tables

    report = Report.of(run)
    summary = report.summary
    derived = Derived()
    reading = derived.text("how to read the figures", lambda: notes.reading_line(summary))
    closing = derived.text("the closing sentence", lambda: report.closing)
    if form != "md":
        emit(tables.render(summary, form))
    elif sys.stdout.isatty():
        terminal().print(tables.terminal(summary))
        emit(f"{reading}{closing}")
    else:
        emit("\n".join([tables.markdown(summary), *filter(None, [reading, closing]), ""]))
    if form == "md":  # what weakens the figures must be seen beside them
        print(derived.text("cautions", lambda: report.caution_lines), end="", file=sys.stderr, flush=True)
    with Derived().trying("slopes"):  # tables and plots both need them, and say so themselves if they fail
        _ = report.slopes
    with beside(lambda: write_tables(report)) as written:  # it takes as long again as the table
        pictures = write_plots(report, derived)  # they take seconds: the table is read meanwhile
        with derived.trying("tables"):
            derived.add(written())
    note(*derived.text("what the plots leave out", lambda: limits_line(report.timed)).splitlines())
    note(*page_line(summary["case"].nunique()).splitlines())
    write_page(report, pictures, report.folder / "report.html", derived)
    wanted = Derived()
    if html is not None:
        write_page(report, pictures, html, wanted)
    note(*derived.lines(), *wanted.lines())
    if form == "md":
        emit(f"{run.path}\n")
    else:
        note(run.path)
    failed = summary["status"].isin(FAULTS).any()
    if failed or (summary["status"] == "unsupported").all():
        raise typer.Exit(FailedRun.exit_code)
    if wanted.lines():
        raise typer.Exit(UsageError.exit_code)


def print_plan(job: Job, form: Format) -> None:
    """Print the cases of a run that is not measured, with a rough estimate of the time of each."""
    import msgspec
    import pandas as pd

    from bench.measure.run import case_seconds, estimate
    from bench.tell import tables

    text = estimate(job)
    if form == "md":
        emit(f"{text}\n")
        return
    rows = [
        msgspec.structs.asdict(item.case) | {"estimated_s": round(seconds, 1)}
        for item, seconds in zip(job.manifest.plan, case_seconds(job), strict=True)
    ]
    emit(tables.data(pd.DataFrame(rows), form))
    note("\n".join(text.splitlines()[len(rows) :]))  # what --budget takes away, and the sum


def print_verdicts(
    found: Sequence[Verdict],
    form: DocumentFormat,
    *,
    command: Command,
    title: str,
    require_time: bool = False,
    in_step_summary: bool = True,
) -> NoReturn:
    """Print verdicts, the closing sentence last, and add them to the summary page of a workflow.

    Raises:
        typer.Exit: always, with the exit code of the verdicts.
    """
    from bench.judge.verdict import exit_code
    from bench.store.derived import Derived
    from bench.tell import report, verdicts

    sentence = verdicts.sentence(found, require_time=require_time, command=command)
    if form == "json":
        emit(verdicts.document(found, title=title, require_time=require_time, command=command))
        note(sentence)
    elif sys.stdout.isatty():
        terminal().print(title, verdicts.terminal(found), sentence, sep="\n\n", markup=False, highlight=False)
    else:
        emit(f"{title}\n\n{verdicts.table(found)}\n{sentence}\n")
    derived = Derived()
    if in_step_summary:
        with derived.trying("the workflow's summary (GITHUB_STEP_SUMMARY)"):
            page = verdicts.markdown(found, title=title, require_time=require_time, command=command)
            report.append_step_summary(page)
    note(*derived.lines())
    raise typer.Exit(exit_code(found, require_time=require_time))


def print_ab(folder: Path, form: DocumentFormat, *, in_step_summary: bool = True) -> NoReturn:
    """Print the verdicts of a stored A/B; raises as `print_verdicts`."""
    from bench.ab import record
    from bench.ab.verdicts import stored_verdicts

    stored = record.read(folder)
    command: Command = "ab" if stored.finished else "unfinished ab"
    print_verdicts(stored_verdicts(stored), form, command=command, title=stored.title, in_step_summary=in_step_summary)
