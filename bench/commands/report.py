"""`kvbench report` and `kvbench compare`: stored runs, drawn again and side by side."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from bench.commands import flags
from bench.commands.output import emit, note, print_ab, print_summary
from bench.errors import UsageError


def report(
    run: Annotated[
        str, Argument(metavar="RUN", help="Run folder, or its name under --out; the folder of an A/B, too.")
    ],
    out: flags.Out = flags.RESULTS,
    output_format: flags.TableFormat = "md",
) -> None:
    """Redraw a stored run and print its table.

    Tables and plots are made anew from the samples. For an A/B, also an interrupted one, the verdicts are printed
    (--format md or json) and the exit code is theirs. Works without torch and transformers.

    \b
    Examples:
      kvbench report results/runs/20261123T040000Z-mine
      kvbench report 20261123T040000Z-mine -o csv > mine.csv
    """
    from bench.store.run_folder import find, read_run

    folder, kind = find(run, out)
    if kind == "run":
        print_summary(read_run(folder), output_format)
        return
    if output_format not in ("md", "json"):
        raise UsageError(f"--format {output_format}: {run} is an A/B, whose verdicts are printed as md or json")
    print_ab(folder, output_format, in_step_summary=False)


def compare(
    a: Annotated[str, Argument(metavar="A", help="Run to compare with: a run folder, or its name under --out.")],
    b: Annotated[str, Argument(metavar="B", help="Run to judge.")],
    out: flags.Out = flags.RESULTS,
    output_format: flags.TableFormat = "md",
    plots: Annotated[Path | None, Option(metavar="DIR", help="Folder for the plots [default: in B's folder].")] = None,
) -> None:
    """Compare two runs: what got faster or slower.

    Prints the ratio and its interval for each case and phase, and draws both runs. The runs are different sessions, so
    a ratio also contains whatever else changed between them: use it as a first look, and `kvbench ab` for a verdict.

    \b
    Example:
      kvbench compare 20261123T040000Z-before 20261123T050000Z-after
    """
    from bench.judge.compare import compare as compare_runs
    from bench.store.derived import Derived
    from bench.store.run_folder import find_run, read_run
    from bench.tell.comparison import render
    from bench.tell.report import write_comparison

    run_a, run_b = (read_run(find_run(run, out)) for run in (a, b))
    comparison = compare_runs(run_a, run_b)
    emit(render(comparison, output_format))
    if output_format != "md":  # the rows alone are on stdout: the verdict, and what is not compared, must not be lost
        note(render(comparison, "md"))
    derived = Derived()
    folder = write_comparison(comparison, run_b, plots, derived)
    lost = derived.lines()
    note(*(lost or ["plots: none, nothing was compared" if folder is None else f"plots: {folder}"]))
    if code := comparison.exit_code or (UsageError.exit_code if lost and plots is not None else 0):
        raise typer.Exit(code)
