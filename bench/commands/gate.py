"""`kvbench gate`, `kvbench baseline promote` and `kvbench baseline history`: a run against stored sessions."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from bench.commands import flags
from bench.commands.output import emit, note, print_verdicts
from bench.errors import UsageError

BaselineFolder = Annotated[Path, Option("--baseline-dir", metavar="DIR", help="Folder of baselines.")]
BASELINES = Path("results/baselines")
_ITSELF = " (the baseline is this very run, so its counters are compared with themselves: judge a later run)"


def gate(
    run: Annotated[str, Argument(metavar="RUN", help="Run to judge: a run folder, or its name under --out.")],
    baseline: Annotated[
        str,
        Option(
            "--baseline",
            metavar="PATH",
            help="Folder of a baseline (results/baselines/NAME), with a file for each session; or a single run.",
        ),
    ],
    require_time: Annotated[
        bool, Option("--require-time", help="Exit with 3, not 0, if a time cannot be compared.")
    ] = False,
    out: flags.Out = flags.RESULTS,
    output_format: flags.TextFormat = "md",
) -> None:
    """Judge a run by stored sessions; for CI.

    Exact counters decide on any machine: more forward calls, FLOPs, bytes copied, logits or compiled graphs than in the
    newest session are a regression. Times are judged if five sessions come from this machine with this software, as
    shares of what the machine reached at that moment. Exit codes: 0 passed, 1 regression, 3 a case is missing or
    nothing could be compared, 4 inconclusive, 5 a case of RUN failed, or every case is unsupported.

    \b
    Example:
      kvbench run --preset smoke -t 1 --name ci
      kvbench gate 20261123T040000Z-ci --baseline results/baselines/smoke
    """
    from bench.judge.baseline import newest
    from bench.judge.gate import gate as judge
    from bench.judge.gate import read_baseline
    from bench.store.run_folder import find_run, read_run

    judged, sessions = read_run(find_run(run, out)), read_baseline(baseline, out)
    itself = newest(sessions).run_id == judged.manifest.run_id
    print_verdicts(
        judge(judged, sessions),
        output_format,
        command="gate",
        title=f"kvbench gate: {judged.name}{_ITSELF if itself else ''}",
        require_time=require_time,
    )


def promote(
    run: Annotated[str, Argument(metavar="RUN", help="Run to accept: a run folder, or its name under --out.")],
    name: Annotated[
        str | None, Option(help="Name of the baseline [default: named after the machine and its software].")
    ] = None,
    baseline_dir: BaselineFolder = BASELINES,
    out: flags.Out = flags.RESULTS,
) -> None:
    """Add a run to a baseline as its newest session.

    This is the only command that writes baselines. The newest session sets the cases and counters that `kvbench gate`
    expects; five sessions of one machine set its times. A run with a failed case or with other tokens is refused (exit
    code 5), and so is one that is unfinished or was disturbed (exit code 3).

    \b
    Example:
      kvbench baseline promote 20261123T040000Z-ci --name smoke
    """
    from bench.judge.baseline import promote as add
    from bench.store.run_folder import check_name, find_run, read_run

    folder = None if name is None else check_name(name)
    emit(f"{add(read_run(find_run(run, out)), baseline_dir, folder)}\n")


def history(
    name: Annotated[str | None, Option(help="Name of the baseline [default: the only one there is].")] = None,
    baseline_dir: BaselineFolder = BASELINES,
    plot: Annotated[Path | None, Option(metavar="FILE", help="Draw the drift to FILE.png and FILE.svg.")] = None,
    output_format: flags.TableFormat = "md",
) -> None:
    """Show how a baseline drifted over its sessions.

    Prints the times of each session and marks where counters grew.

    \b
    Example:
      kvbench baseline history --name smoke --plot drift
    """
    from bench.judge.baseline import find_baseline
    from bench.judge.drift import drift
    from bench.store.derived import Derived
    from bench.store.sessions import read_sessions
    from bench.tell import tables
    from bench.tell.drift import markdown

    folder = find_baseline(baseline_dir, name)
    frame = drift(read_sessions(folder))
    emit(markdown(frame) if output_format == "md" else tables.data(frame, output_format))
    if plot is not None:
        derived = Derived()
        with derived.trying(f"--plot {plot}"):
            from bench.tell.plots.drift import figure
            from bench.tell.plots.style import own_settings, save

            with own_settings():
                written = save(figure(frame, folder.name), plot.with_suffix(""))
            note(f"plot: {written[0]}")
        if lost := derived.lines():
            note(*lost)
            raise typer.Exit(UsageError.exit_code)
