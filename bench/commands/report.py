"""`kvbench report` and `kvbench compare`: stored runs, drawn again and side by side."""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from bench.commands import flags
from bench.commands.output import emit, note, print_ab, print_summary, terminal
from bench.errors import UsageError


def report(
    run: Annotated[
        str, Argument(metavar="RUN", help="Run folder, or its name under --out; the folder of an A/B, too.")
    ],
    out: flags.Out = flags.RESULTS,
    output_format: flags.TableFormat = "md",
    html: Annotated[Path | None, Option(metavar="FILE", help="Write the page here, too: one file for offline.")] = None,
) -> None:
    """Redraw a stored run and print its table.

    Tables, plots and the page report.html are made anew from the samples. For an A/B, also an interrupted one, the
    verdicts are printed (--format md or json) and the exit code is theirs. Works without torch and transformers.

    \b
    Examples:
      kvbench report results/runs/20261123T040000Z-mine
      kvbench report 20261123T040000Z-mine -o csv > mine.csv
      kvbench report 20261123T040000Z-mine --html mine.html
    """
    from bench.store.run_folder import find, read_run

    folder, kind = find(run, out)
    if kind == "run":
        print_summary(read_run(folder), output_format, html)
        return
    if html is not None:
        raise UsageError(f"--html: {run} is an A/B; only a run has a page")
    if output_format not in ("md", "json"):
        raise UsageError(f"--format {output_format}: {run} is an A/B, whose verdicts are printed as md or json")
    print_ab(folder, output_format, in_step_summary=False)


def compare(
    runs: Annotated[
        list[str],
        Argument(
            metavar="FOLDER",
            help="Two runs or more: folders, or names under --out. The first is what the others are compared with.",
        ),
    ],
    out: flags.Out = flags.RESULTS,
    output_format: flags.TableFormat = "md",
    plots: Annotated[
        Path | None, Option(metavar="DIR", help="Folder for the plots [default: in the last run's folder].")
    ] = None,
    html: Annotated[
        Path | None,
        Option(metavar="FILE", help="Write a page that compares the runs, with a switch of the baseline."),
    ] = None,
) -> None:
    """Compare runs: what got faster or slower.

    Prints the ratio and its interval for each case and phase, and draws the runs. The runs are different sessions, so
    a ratio also contains whatever else changed between them: use it as a first look, and `kvbench ab` for a verdict.
    Three and more runs are ranked, and two that differ as a whole, as runs of two models: grouped by what they share.

    \b
    Examples:
      kvbench compare 20261123T040000Z-before 20261123T050000Z-after
      kvbench compare gpt2 smollm2 qwen3 --html models.html
    """
    from bench.analysis.tidy import Tidy
    from bench.judge.compare import compare
    from bench.judge.ranking import Ranking
    from bench.store.derived import Derived
    from bench.store.run_folder import find_run, read_run
    from bench.tell import comparison, ranking
    from bench.tell.drawn import cases_line
    from bench.tell.ranking_files import write_comparison_page, write_ranking
    from bench.tell.report import write_comparison

    if len(runs) < 2:
        raise UsageError(f"compare: {' '.join(runs)} alone; give two runs or more, as in `kvbench compare A B`")
    found = [Tidy.lean(read_run(find_run(run, out))) for run in runs]  # the steps of one large run at a time
    two = compare(*found) if len(found) == 2 else None
    ranked = Ranking.of(found) if two is None or two.rows.empty else None
    if two is not None and (ranked is None or ranked.entries.empty):
        n_rows, code, render = len(two.rows), two.exit_code, partial(comparison.render, two)
        show = partial(comparison.terminal, two)
        draw = partial(write_comparison, two, found[1].run)
    else:
        assert ranked is not None
        n_rows, code, render = len(ranked.entries), ranked.exit_code, partial(ranking.render, ranked)
        show = partial(ranking.terminal, ranked)
        draw = partial(write_ranking, ranked)
    if output_format == "md" and sys.stdout.isatty():
        terminal().print(show(), markup=False, highlight=False)
    else:
        emit(render(output_format))
    if output_format != "md":  # the rows alone are on stdout: the verdict, and what is not compared, must not be lost
        note(render("md"))
    derived, wanted = Derived(), Derived()
    folder = draw(plots, derived)
    note(*(derived.lines() or ["plots: none, nothing was compared" if folder is None else f"plots: {folder}"]))
    note(*cases_line(0 if folder is None else n_rows).splitlines())
    if html is not None:
        write_comparison_page(ranked or Ranking.of(found), html, wanted)
        note(*(wanted.lines() or [f"page: {html}"]))
    lost = wanted.lines() or (derived.lines() if plots is not None else [])
    if code := code or (UsageError.exit_code if lost else 0):
        raise typer.Exit(code)
