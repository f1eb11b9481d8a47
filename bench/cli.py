"""The command `kvbench`. torch and transformers are imported only inside the commands that run a model."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from bench import explain
from bench.case import PRESETS, UsageError
from bench.store import DataError

if TYPE_CHECKING:
    from bench.record import Run
    from bench.tables import Format

EXIT_USAGE, EXIT_DATA, EXIT_FAILED_CASE, EXIT_INTERRUPTED, EXIT_TERMINATED = 2, 3, 5, 130, 143

app = typer.Typer(
    name="kvbench",
    help="Measure what a KV cache buys: naive re-feed and KV-cached generation side by side, on the same weights.",
    epilog="Start with: kvbench run --preset smoke. Exit codes: 0 done, 1 regression, 2 bad input, 3 stored data "
    "missing or damaged, 4 inconclusive, 5 a case failed, 130/143 interrupted.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

OutFolder = Annotated[Path, typer.Option("--out", help="Folder of run folders.")]
FormatOption = Annotated[str, typer.Option("-o", "--format", help="Of the table on stdout: md, csv, json or jsonl.")]
Model = Annotated[
    str | None,
    typer.Option(
        "-m",
        "--model",
        help=f"{explain.models()} A list makes a grid.",
    ),
]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; a list makes a grid.")]
Threads = Annotated[
    str | None, typer.Option("-t", "--threads", help="CPU threads [default: all cores]; a list makes a grid.")
]
Device = Annotated[str | None, typer.Option("--device", help="cpu or cuda [default: cpu].")]
Attention = Annotated[
    str | None, typer.Option("--attn-implementation", help="eager, sdpa, ... [default: sdpa where the model has it].")
]
RESULTS = Path("results/runs")


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"kvbench {version('kvbench')}")
        raise typer.Exit


@app.callback()
def kvbench(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """The flags before a command."""


@app.command(epilog=explain.below_the_flags())
def run(
    preset: Annotated[
        str, typer.Option("--preset", help=f"A prepared grid: {', '.join(PRESETS)} (see below).")
    ] = "default",
    model: Model = None,
    strategies: Annotated[
        str | None, typer.Option("--strategies", help=f"A list of these. {explain.strategies()}.")
    ] = None,
    n_prompt: Annotated[str | None, typer.Option("-p", "--n-prompt", help="Prompt lengths, as in 32,128,512.")] = None,
    n_gen: Annotated[str | None, typer.Option("-n", "--n-gen", help="Tokens to generate.")] = None,
    n_depth: Annotated[
        str | None, typer.Option("-d", "--n-depth", help="Tokens in the cache before the prompt.")
    ] = None,
    batch_size: Annotated[str | None, typer.Option("-b", "--batch-size", help="Sequences at once.")] = None,
    dtype: Dtype = None,
    threads: Threads = None,
    device: Device = None,
    attn_implementation: Attention = None,
    naive_logits: Annotated[
        str | None,
        typer.Option("--naive-logits", help="LM head of naive: of the last position (fair) or of all (literal)."),
    ] = None,
    repetitions: Annotated[
        int | None, typer.Option("-r", "--repetitions", help="Rounds; six or more give intervals [default: 6].")
    ] = None,
    processes: Annotated[
        int | None, typer.Option("--processes", help="Fresh processes per strategy [default: 1].")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of prompts and random weights [default: 0].")] = None,
    timeout: Annotated[
        float | None, typer.Option("--timeout", help="Seconds that a case may take in a process [default: 900].")
    ] = None,
    out: OutFolder = RESULTS,
    name: Annotated[str | None, typer.Option("--name", help="Of the run folder, after its time.")] = None,
    resume: Annotated[str | None, typer.Option("--resume", help="RUN: measure only what it lacks.")] = None,
    output_format: FormatOption = "md",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the grid and an estimate, measure nothing.")
    ] = False,
) -> None:
    """Measure a grid of cases, write a run folder, print the summary table.

    Comma-separated values make a grid; what is not given comes from the preset.

    Examples: kvbench run -m random:gpt2 -p 64,256 -n 16 · kvbench run --strategies naive,dynamic -b 1,4 ·
    kvbench run --resume RUN
    """
    from bench import jobs, options, tables

    form = options.one("--format", output_format, tables.FORMATS)
    if resume is not None:
        grid = (model, strategies, n_prompt, n_gen, n_depth, batch_size, dtype, threads, device, name)
        settings = (attn_implementation, naive_logits, seed, repetitions, processes, timeout)
        if preset != "default" or any(value is not None for value in (*grid, *settings)):
            raise UsageError("--resume goes on with what the run was asked for: leave out every flag but --out and -o")
        job = jobs.resume(resume, out)
    else:
        sweeps = options.sweeps(
            preset,
            model=model,
            strategies=strategies,
            n_prompt=n_prompt,
            n_gen=n_gen,
            n_depth=n_depth,
            batch_size=batch_size,
            dtype=dtype,
            threads=threads,
            device_name=device,
            attn_implementation=attn_implementation,
            naive_logits=naive_logits,
            seed=seed,
        )
        job = jobs.plan(sweeps, options.limits(repetitions, processes, timeout), out, name)
    if dry_run:
        _emit(f"{jobs.estimate(job)}\n")
        return
    finished = jobs.measure(job)
    _print_summary(finished, form)


@app.command()
def report(
    run: Annotated[str, typer.Argument(metavar="RUN")], out: OutFolder = RESULTS, output_format: FormatOption = "md"
) -> None:
    """Redraw the tables and plots of a run from its samples, and print its summary table.

    RUN is a run folder, or a name under --out. Works without torch and transformers.
    """
    from bench import options, tables
    from bench.store import find_run, read_run

    form = options.one("--format", output_format, tables.FORMATS)
    _print_summary(read_run(find_run(run, out)), form)


@app.command()
def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="The run to compare with.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The run to judge.")],
    out: OutFolder = RESULTS,
    output_format: FormatOption = "md",
    plots: Annotated[Path | None, typer.Option("--plots", help="Folder of the plots [default: in B's folder].")] = None,
) -> None:
    """Set two runs side by side: ratio and interval per case and phase, what got faster or slower, and plots.

    The runs are different sessions, so a ratio also holds whatever changed between them: use it as a first look.
    """
    from bench import options, tables
    from bench.compare import compare as compare_runs
    from bench.compare import render
    from bench.report import write_comparison
    from bench.store import find_run, read_run

    form = options.one("--format", output_format, tables.FORMATS)
    run_a, run_b = (read_run(find_run(run, out)) for run in (a, b))
    comparison = compare_runs(run_a, run_b)
    _emit(render(comparison, form))
    if form != "md":  # the rows alone are on stdout: the verdict, and what is not compared, must not be lost
        print(render(comparison, "md"), file=sys.stderr)
    folder = write_comparison(comparison, run_b, plots)
    print(f"plots: {folder}", file=sys.stderr)
    if comparison.exit_code:
        raise typer.Exit(comparison.exit_code)


@app.command()
def generate(
    prompt: Annotated[str, typer.Option("--prompt", help="The text to continue.")],
    model: Annotated[str, typer.Option("-m", "--model", help=explain.models())] = "smollm2-135m",
    strategy: Annotated[str, typer.Option("--strategy", help=f"One of these. {explain.strategies()}.")] = "dynamic",
    n_gen: Annotated[int, typer.Option("-n", "--n-gen", help="Most tokens to generate.")] = 128,
    stop_token_id: Annotated[
        int | None, typer.Option("--stop-token-id", help="Stop after this token [default: end of sequence only].")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "float32",
    threads: Annotated[int | None, typer.Option("-t", "--threads", help="CPU threads [default: all cores].")] = None,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option("--seed", help="Of random weights.")] = 0,
) -> None:
    """Continue a text greedily with any strategy; stdout is the continuation alone, as it comes.

    Stops at the model's end-of-sequence token, at --stop-token-id, or after --n-gen tokens.
    """
    from bench import options
    from bench.text import stream
    from kvcache.catalogue import STRATEGIES
    from kvcache.models import DTYPES

    options.one("--strategy", strategy, STRATEGIES)
    options.one("--dtype", dtype, DTYPES)
    options.at_least("--n-gen", n_gen, 1)
    stream(
        model,
        prompt,
        strategy=strategy,
        n_gen=n_gen,
        stop_token_id=stop_token_id,
        dtype=dtype,
        n_threads=options.thread_counts(None if threads is None else str(threads))[0],
        device=options.device(device),
        seed=seed,
    )


@app.command()
def env(
    output_format: Annotated[str, typer.Option("-o", "--format", help="md or json.")] = "md",
    ceilings: Annotated[
        bool, typer.Option("--ceilings/--no-ceilings", help="Measure read bandwidth and GEMM rate (some seconds).")
    ] = True,
) -> None:
    """Show this machine and its software, as a run would store them, and how fast it reads and multiplies.

    The ceilings are what MBU and MFU are shares of: the fastest of several kernels, with one thread and with all, in
    float32 and bfloat16. They drift with what else the machine does, so a run measures them beside its cases.
    """
    from bench import options, survey, tables
    from bench.environment import read_environment

    form = options.one("--format", output_format, tables.ENVIRONMENT_FORMATS)
    environment = read_environment()
    found = survey.survey(survey.settings_here(environment), _tell) if ceilings else []
    _emit(tables.render_environment(environment, form, found))


class Stopped(BaseException):
    """SIGINT or SIGTERM came: end, keeping what was measured. Its notes say what that is."""

    def __init__(self, number: int) -> None:
        super().__init__("interrupted" if number == signal.SIGINT else "terminated")
        self.code = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_TERMINATED


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command; every error that a user can cause is one line on stderr and an exit code of the contract."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stopped)
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        code = app(arguments or ["--help"], standalone_mode=False)
    except UsageError as error:
        code = _complain(str(error), EXIT_USAGE)
    except DataError as error:
        code = _complain(str(error), EXIT_DATA)
    except typer.TyperException as error:
        code = _complain(_pointing_to_help(error), EXIT_USAGE)
    except Stopped as stop:
        _end_children()
        code = _complain(_with_notes(str(stop), stop), stop.code)
    except OSError as error:  # a full disk, a folder that went away: what was stored before is safe
        told = f"{error.filename or 'writing'}: {error.strerror or error}"
        code = _complain(_with_notes(told, error), EXIT_FAILED_CASE)
    except Exception as error:  # not foreseen; it must not end with 1, which says regression
        if "KVBENCH_TRACEBACK" in os.environ:
            raise
        told = f"{type(error).__name__}: {error} (set KVBENCH_TRACEBACK=1 to see where)"
        code = _complain(_with_notes(told, error), EXIT_FAILED_CASE)
    sys.exit(code if isinstance(code, int) else 0)


def _print_summary(finished: Run, form: Format) -> None:
    """Write the derived files, print the table where its reader expects it, and leave with 5 if a case failed."""
    from bench import notes, report, tables
    from bench.cautions import cautions

    summary = report.write_report(finished)
    if form != "md":
        _emit(tables.data(summary, form))
        print(finished.path, file=sys.stderr)
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(tables.terminal(summary))
        print(f"{notes.reading_line(summary)}{finished.path}")
    else:
        _emit("\n".join([tables.markdown(summary), notes.reading_line(summary), f"{finished.path}\n"]))
    if form == "md":  # what weakens the figures must be seen beside them
        print(notes.caution_lines(cautions(finished)), end="", file=sys.stderr)
    failed = summary["status"].isin(["failed", "oom", "timeout"]).any()
    if failed or (summary["status"] == "unsupported").all():
        raise typer.Exit(EXIT_FAILED_CASE)


def _emit(text: str) -> None:
    """Write to stdout; a reader that has seen enough (`| head`) is no error."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _tell(text: str) -> None:
    """Progress of a command that prints a document."""
    print(text, file=sys.stderr, flush=True)


def _complain(message: str, code: int) -> int:
    print(f"kvbench: {' '.join(message.split())}", file=sys.stderr)
    return code


def _pointing_to_help(error: typer.TyperException) -> str:
    """The message of a command line that cannot be parsed, and where the valid ones are told."""
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    context = getattr(error, "ctx", None)
    command = f"{context.info_name} " if context is not None and context.parent is not None else ""
    return f"{message.rstrip('.')}; see kvbench {command}--help"


def _with_notes(message: str, error: BaseException) -> str:
    """The message and what was noted on the error on its way, as what is kept of a run."""
    return "; ".join([message, *getattr(error, "__notes__", [])])


def _end_children() -> None:
    """End a worker whose start the signal cut off, so that nothing in this process knew of it."""
    import psutil

    children = psutil.Process().children()
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(children, timeout=5)


def _stopped(number: int, _frame: FrameType | None) -> NoReturn:
    raise Stopped(number)


if __name__ == "__main__":
    main()
