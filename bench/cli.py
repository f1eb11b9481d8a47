"""The command `kvbench`. torch and transformers are imported only inside the commands that run a model."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from bench.case import PRESETS
from bench.commands import explain
from bench.errors import KvbenchError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.record import Run, Verdict
    from bench.tell.tables import Format
    from bench.tell.verdicts import Command, VerdictFormat

EXIT_USAGE, EXIT_FAILED_CASE, EXIT_INTERRUPTED, EXIT_TERMINATED = 2, 5, 130, 143

app = typer.Typer(
    name="kvbench",
    help="Measure what a KV cache buys: naive re-feed and KV-cached generation side by side, on the same weights.",
    epilog="Start with: kvbench run --preset smoke. Exit codes: 0 done, 1 regression, 2 bad input, 3 stored data "
    "missing or damaged, 4 inconclusive, 5 a case failed, 130/143 interrupted.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
baseline_app = typer.Typer(help="Set a baseline, and look at its drift.", rich_markup_mode=None)
app.add_typer(baseline_app, name="baseline")

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
ThreadCount = Annotated[str | None, typer.Option("-t", "--threads", help="CPU threads [default: all cores].")]
Device = Annotated[str | None, typer.Option("--device", help="cpu or cuda [default: cpu].")]
Attention = Annotated[
    str | None, typer.Option("--attn-implementation", help="eager, sdpa, ... [default: sdpa where the model has it].")
]
BaselineFolder = Annotated[Path, typer.Option("--baseline-dir", help="Folder of baselines.")]
RESULTS = Path("results/runs")
BASELINES = Path("results/baselines")


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
    ceilings: Annotated[
        bool, typer.Option("--ceilings/--no-ceilings", help="Measure the machine's roofs beside the cases (MFU, MBU).")
    ] = True,
) -> None:
    """Measure a grid of cases, write a run folder, print the summary table.

    Comma-separated values make a grid; what is not given comes from the preset.

    Examples: kvbench run -m random:gpt2 -p 64,256 -n 16 · kvbench run --strategies naive,dynamic -b 1,4 ·
    kvbench run --resume RUN
    """
    from bench.commands import flags
    from bench.measure import run
    from bench.measure.plan import within_positions
    from bench.measure.server_process import RunServers
    from bench.tell import tables

    form = flags.one("--format", output_format, tables.FORMATS)
    with RunServers() as servers:
        if resume is not None:
            grid = (model, strategies, n_prompt, n_gen, n_depth, batch_size, dtype, threads, device, name)
            settings = (attn_implementation, naive_logits, seed, repetitions, processes, timeout)
            if preset != "default" or not ceilings or any(value is not None for value in (*grid, *settings)):
                raise UsageError(
                    "--resume goes on with what the run was asked for: leave out every flag but --out and -o"
                )
            job = run.resume(resume, out)
        else:
            sweeps = flags.sweeps(
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
            if not dry_run:
                servers.start(sweeps[0].models[0], sweeps[0].n_threads[0])  # it imports torch while this process plans
            if n_prompt is None:
                sweeps = within_positions(sweeps, _tell)
            job = replace(run.plan(sweeps, flags.limits(repetitions, processes, timeout), out, name), ceilings=ceilings)
        if dry_run:
            _emit(f"{run.estimate(job)}\n")
            return
        finished = run.measure(job, servers)
    _print_summary(finished, form)


@app.command()
def report(
    run: Annotated[str, typer.Argument(metavar="RUN")], out: OutFolder = RESULTS, output_format: FormatOption = "md"
) -> None:
    """Redraw the tables and plots of a run from its samples, and print its summary table.

    RUN is a run folder, or a name under --out. Of an A/B's folder, also of one that was interrupted, it prints the
    verdicts (--format md or json), and leaves with their exit code. Works without torch and transformers.
    """
    from bench.ab import record
    from bench.ab.verdicts import stored_verdicts
    from bench.commands import flags
    from bench.store.run_folder import find, read_run
    from bench.tell import tables, verdicts

    folder, kind = find(run, out)
    if kind == "ab":
        verdict_form = flags.one("--format", output_format, verdicts.VERDICT_FORMATS)
        found = record.read(folder)
        command: Command = "ab" if found.finished else "unfinished ab"
        _print_verdicts(stored_verdicts(found), verdict_form, command=command, title=found.title, in_step_summary=False)
    form = flags.one("--format", output_format, tables.FORMATS)
    _print_summary(read_run(folder), form)


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
    from bench.commands import flags
    from bench.judge.compare import compare as compare_runs
    from bench.store.run_folder import find_run, read_run
    from bench.tell import tables
    from bench.tell.comparison import render
    from bench.tell.report import write_comparison

    form = flags.one("--format", output_format, tables.FORMATS)
    run_a, run_b = (read_run(find_run(run, out)) for run in (a, b))
    comparison = compare_runs(run_a, run_b)
    _emit(render(comparison, form))
    if form != "md":  # the rows alone are on stdout: the verdict, and what is not compared, must not be lost
        print(render(comparison, "md"), file=sys.stderr)
    folder = write_comparison(comparison, run_b, plots)
    print("plots: none, nothing was compared" if folder is None else f"plots: {folder}", file=sys.stderr)
    if comparison.exit_code:
        raise typer.Exit(comparison.exit_code)


@app.command()
def gate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run to judge: a run folder, or a name under --out.")],
    baseline: Annotated[
        str, typer.Option("--baseline", help="A folder with a file per session (results/baselines/NAME), or a run.")
    ],
    require_time: Annotated[
        bool, typer.Option("--require-time", help="Exit 3 where a time cannot be compared, instead of 0.")
    ] = False,
    out: OutFolder = RESULTS,
    output_format: Annotated[str, typer.Option("-o", "--format", help="md or json.")] = "md",
) -> None:
    """Judge a run by stored sessions; exit 1 on a regression.

    Exact counters decide on any machine: more forwards, FLOPs, bytes copied, logits or compiled graphs than the newest
    session has is a regression. Times are judged where five sessions come from this very machine and software, as
    shares of what it could do at that moment. Exit codes: 0 passed, 1 regression, 3 a case is missing or nothing could
    be compared, 4 inconclusive, 5 a case of RUN failed, or none is supported.
    """
    from bench.commands import flags
    from bench.judge.gate import gate as judge
    from bench.judge.gate import read_baseline
    from bench.store.run_folder import find_run, read_run
    from bench.tell import verdicts

    form = flags.one("--format", output_format, verdicts.VERDICT_FORMATS)
    judged = read_run(find_run(run, out))
    found = judge(judged, read_baseline(baseline, out))
    _print_verdicts(found, form, command="gate", title=f"kvbench gate: {judged.name}", require_time=require_time)


@baseline_app.command()
def promote(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or a name under --out.")],
    name: Annotated[
        str | None, typer.Option("--name", help="Of the baseline [default: named after the machine and software].")
    ] = None,
    baseline_dir: BaselineFolder = BASELINES,
    out: OutFolder = RESULTS,
) -> None:
    """Accept RUN: add it to a baseline as its newest session. The only command that writes baselines.

    The newest session sets the cases and counters that `kvbench gate` expects; five of one machine set its times. A
    run with a failed case, or with other tokens, is refused (exit 5), and one that was disturbed, too (exit 3).
    """
    from bench.judge.baseline import promote as add
    from bench.store.run_folder import check_name, find_run, read_run

    folder = None if name is None else check_name(name)
    print(add(read_run(find_run(run, out)), baseline_dir, folder))


@baseline_app.command()
def history(
    name: Annotated[
        str | None, typer.Option("--name", help="Of the baseline [default: the only one there is].")
    ] = None,
    baseline_dir: BaselineFolder = BASELINES,
    plot: Annotated[Path | None, typer.Option("--plot", help="Also draw it: FILE.png and FILE.svg.")] = None,
    output_format: FormatOption = "md",
) -> None:
    """Show how the times of a baseline drifted over its sessions, and where its counters grew."""
    from bench.commands import flags
    from bench.judge.baseline import find_baseline
    from bench.judge.drift import drift
    from bench.store.sessions import read_sessions
    from bench.tell import tables
    from bench.tell.drift import markdown
    from bench.tell.plots.drift import figure
    from bench.tell.plots.style import save

    form = flags.one("--format", output_format, tables.FORMATS)
    folder = find_baseline(baseline_dir, name)
    frame = drift(read_sessions(folder))
    _emit(markdown(frame) if form == "md" else tables.data(frame, form))
    if plot is not None:
        try:
            written = save(figure(frame, folder.name), plot.with_suffix(""))
        except OSError as error:
            raise UsageError(f"--plot {plot}: cannot be written ({error.strerror})") from error
        print(f"plot: {written[0]}", file=sys.stderr)


@app.command()
def ab(
    base: Annotated[str | None, typer.Argument(metavar="[BASE]", help="The revision to compare with.")] = None,
    head: Annotated[
        str | None, typer.Argument(metavar="[HEAD]", help="The revision to judge [default: the working tree as it is].")
    ] = None,
    base_python: Annotated[str | None, typer.Option("--base-python", help="Interpreter of base's environment.")] = None,
    head_python: Annotated[str | None, typer.Option("--head-python", help="Interpreter of head's environment.")] = None,
    base_env: Annotated[list[str] | None, typer.Option("--base-env", help="NAME=VALUE for base; repeatable.")] = None,
    head_env: Annotated[list[str] | None, typer.Option("--head-env", help="NAME=VALUE for head; repeatable.")] = None,
    model: Model = None,
    strategies: Annotated[str, typer.Option("--strategies", help="As a list.")] = "naive,dynamic",
    n_prompt: Annotated[str, typer.Option("-p", "--n-prompt", help="Prompt lengths, as in 32,128,512.")] = "128",
    n_gen: Annotated[str, typer.Option("-n", "--n-gen", help="Tokens to generate.")] = "32",
    n_depth: Annotated[str | None, typer.Option("-d", "--n-depth", help="Tokens in the cache before it.")] = None,
    batch_size: Annotated[str | None, typer.Option("-b", "--batch-size", help="Sequences at once.")] = None,
    dtype: Dtype = None,
    threads: Threads = None,
    device: Device = None,
    attn_implementation: Attention = None,
    naive_logits: Annotated[str | None, typer.Option("--naive-logits", help="LM head of naive: last or all.")] = None,
    threshold: Annotated[
        float, typer.Option("--threshold", help="A change up to this share counts as none: 0.03 is three percent.")
    ] = 0.03,
    budget: Annotated[float, typer.Option("--budget", help="Minutes that it should take in all.")] = 10.0,
    seed: Annotated[int | None, typer.Option("--seed", help="Of prompts and random weights [default: 0].")] = None,
    timeout: Annotated[float | None, typer.Option("--timeout", help="Seconds a request may take.")] = None,
    out: OutFolder = RESULTS,
    name: Annotated[str | None, typer.Option("--name", help="Of the folder of its record, after its time.")] = None,
    output_format: Annotated[str, typer.Option("-o", "--format", help="md or json.")] = "md",
) -> None:
    """Judge HEAD against BASE: two revisions of this repository, or two environments, measured in turns in one go.

    Each side runs its own checkout in processes of its own. Every case is screened, what looks different is confirmed
    in fresh processes with fresh prompts, until all is decided or --budget is spent; a change near --threshold may go
    either way. Exit codes: 0 nothing is slower, 1 regression, 3 the sides cannot be compared or one cannot run a case,
    4 undecided, 5 head fails or emits other tokens, or neither side supports any case.

    Examples: kvbench ab main · kvbench ab v0.1.0 HEAD -m py:my_model:build · kvbench ab --head-python new/bin/python
    """
    from bench.ab import run as abtest
    from bench.commands import flags
    from bench.tell import verdicts

    form = flags.one("--format", output_format, verdicts.VERDICT_FORMATS)
    settings = abtest.settings(threshold, budget, flags.limits(None, None, timeout).timeout_s)
    sweeps = flags.sweeps(
        "default",
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
    pythons, variables = {"base": base_python, "head": head_python}, {"base": base_env or [], "head": head_env or []}
    with abtest.sides(base, head, pythons=pythons, variables=variables, here=Path.cwd()) as (old, new):
        found = abtest.compare(old, new, sweeps, settings, out, name, _tell)
    print(found.folder, file=sys.stderr)
    _print_verdicts(found.verdicts, form, command="ab", title=found.title)


@app.command()
def generate(
    prompt: Annotated[str, typer.Option("--prompt", help="The text to continue.")],
    model: Annotated[str, typer.Option("-m", "--model", help=explain.models())] = "smollm2-135m",
    strategy: Annotated[str, typer.Option("--strategy", help=f"One of these. {explain.strategies()}.")] = "dynamic",
    n_gen: Annotated[
        int | None,
        typer.Option("-n", "--n-gen", help="Most tokens to generate [default: 128, or the model's positions]."),
    ] = None,
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
    from bench.commands import flags
    from bench.study.generate import stream
    from kvcache.models import DTYPES
    from kvcache.strategies.catalogue import STRATEGIES

    flags.one("--strategy", strategy, STRATEGIES)
    flags.one("--dtype", dtype, DTYPES)
    flags.at_least("--n-gen", 1 if n_gen is None else n_gen, 1)
    stream(
        model,
        prompt,
        strategy=strategy,
        n_gen=n_gen,
        stop_token_id=stop_token_id,
        dtype=dtype,
        n_threads=flags.thread_counts(None if threads is None else str(threads))[0],
        device=flags.device(device),
        seed=seed,
    )


@app.command()
def trace(
    prompt: Annotated[str, typer.Option("--prompt", help="The text to continue.")],
    model: Annotated[str, typer.Option("-m", "--model", help="As in `kvbench run`.")] = "smollm2-135m",
    strategies: Annotated[
        str, typer.Option("--strategies", help="Any of `kvbench run`, side by side.")
    ] = "naive,dynamic",
    n_gen: Annotated[int | None, typer.Option("-n", "--n-gen", help="Most steps [default: 16].")] = None,
    until: Annotated[
        int | None, typer.Option("--until", metavar="TOKEN_ID", help="Stop after this token, as after [EOS].")
    ] = None,
    show_input: Annotated[
        bool, typer.Option("--show-input", help="Print each step's whole input below the table.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw the trace: .png, .svg, .pdf.")
    ] = None,
    picture: Annotated[str, typer.Option("--picture", help="Of --plot: masks, work, shift, or all in one.")] = "all",
    dtype: Annotated[str, typer.Option("--dtype")] = "float32",
    threads: ThreadCount = None,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option("--seed", help="Of random weights.")] = 0,
    output_format: Annotated[str, typer.Option("-o", "--format", help="md or json.")] = "md",
) -> None:
    """Show step by step what goes into the model and what comes out, without a cache and with one, side by side.

    T=1 is the prefill: the prompt goes in, one token comes out. From T=2 on naive is fed everything again, a cached
    strategy one token.

    Examples: kvbench trace --prompt "Lionel Messi is a" --until 198 · kvbench trace -m DIR --prompt "" --plot trace.png
    """
    from bench.commands import flags
    from bench.study import trace as tracing
    from bench.study import trace_pictures, trace_tables
    from kvcache.models import DTYPES
    from kvcache.strategies.catalogue import STRATEGIES

    form = flags.one("--format", output_format, trace_tables.TRACE_FORMATS)
    flags.one("--dtype", dtype, DTYPES)
    flags.at_least("--n-gen", 1 if n_gen is None else n_gen, 1)
    drawing = trace_pictures.check(plot, flags.one("--picture", picture, trace_pictures.PICTURES))
    traced = tracing.run(
        model,
        prompt,
        strategies=flags.choices("--strategies", strategies, STRATEGIES),
        n_gen=n_gen,
        until=until,
        dtype=dtype,
        n_threads=flags.thread_counts(threads)[0],
        device=flags.device(device),
        seed=seed,
    )
    if form == "json":
        _emit(trace_tables.as_json(traced))
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(trace_tables.terminal(traced))
    else:
        _emit(trace_tables.markdown(traced))
    if show_input and form == "md":
        _emit(f"\n{trace_tables.inputs(traced)}")
    if drawing is not None:
        drawing(traced)
        print(f"plot: {plot}", file=sys.stderr)
    if traced.tokens_match != "true":
        print(f"kvbench: the strategies chose different tokens ({traced.tokens_match})", file=sys.stderr)
    if traced.tokens_match == "false":
        raise typer.Exit(EXIT_FAILED_CASE)


@app.command()
def train(
    text: Annotated[
        Path | None,
        typer.Option("--text", help="UTF-8 file, a text a line [default: twelve lines of our own]."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="New folder for the model.")] = None,
    context_length: Annotated[
        int | None, typer.Option("--context-length", help="Positions of every text, cut or padded [default: 64].")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="word or bpe, made from the text [default: word].")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Of the optimizer [default: 80].")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of weights and order [default: 0].")] = None,
    threads: ThreadCount = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="DIR", help="Go on with a training that was interrupted.")
    ] = None,
    output_format: Annotated[str, typer.Option("-o", "--format", help="md or json.")] = "md",
) -> None:
    """Train a small GPT-2 on a text: [SOS] and [EOS] around each line, each token predicts the next, one static shape.

    The result is an ordinary checkpoint folder that every other command takes as --model DIR; DIR/loss.png is its
    loss curve.

    Examples: kvbench train --out love · kvbench generate -m love --prompt "" · kvbench train --resume love
    """
    from bench.commands import flags
    from bench.study import train as training

    form = flags.one("--format", output_format, training.TRAINING_FORMATS)
    if resume is not None:
        given = (text, out, context_length, tokenizer, steps, seed, threads)
        if any(value is not None for value in given):
            raise UsageError("--resume goes on with what the training was asked for: leave out every flag but -o")
        folder = resume
    elif out is None:
        raise UsageError("--out: give a new folder for the model, or --resume the folder of a training")
    else:
        kind = None if tokenizer is None else flags.one("--tokenizer", tokenizer, training.TOKENIZERS)
        settings = training.settings(context_length, kind, steps, seed, flags.thread_counts(threads)[0])
        training.begin(out, text, settings)
        folder = out
    outcome = training.train(folder)
    _emit(training.render(outcome, folder, form))
    if advice := training.advice(outcome):
        print(f"kvbench: {advice}", file=sys.stderr)


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
    from bench.commands import flags
    from bench.machine.environment import read_environment
    from bench.measure import ceiling_turns
    from bench.measure.server_process import RunServers
    from bench.tell import tables

    form = flags.one("--format", output_format, tables.ENVIRONMENT_FORMATS)
    environment = read_environment()
    found = []
    if ceilings:
        with RunServers() as servers:
            settings = ceiling_turns.settings_here(environment)
            found = ceiling_turns.survey(settings, lambda n_threads: servers.fork("", n_threads), _tell)
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
    except KvbenchError as error:
        code = _complain(str(error), error.exit_code)
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
    from bench.tell import notes, tables
    from bench.tell.report import Report, write_plots, write_tables

    report = Report.of(finished)
    summary = report.summary
    write_tables(report)
    if form != "md":
        _emit(tables.render(summary, form))
        print(finished.path, file=sys.stderr)
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(tables.terminal(summary))
        print(f"{notes.reading_line(summary)}{finished.path}")
    else:
        _emit("\n".join([tables.markdown(summary), notes.reading_line(summary), f"{finished.path}\n"]))
    if form == "md":  # what weakens the figures must be seen beside them
        print(notes.caution_lines(report.cautions), end="", file=sys.stderr)
    write_plots(report)
    failed = summary["status"].isin(["failed", "oom", "timeout"]).any()
    if failed or (summary["status"] == "unsupported").all():
        raise typer.Exit(EXIT_FAILED_CASE)


def _print_verdicts(
    found: Sequence[Verdict],
    form: VerdictFormat,
    *,
    command: Command,
    title: str,
    require_time: bool = False,
    in_step_summary: bool = True,
) -> NoReturn:
    """Print verdicts, the closing sentence last, add them to a workflow's summary, and leave with their exit code."""
    from bench.tell import report, verdicts

    sentence = verdicts.sentence(found, require_time=require_time, command=command)
    if form == "json":
        _emit(verdicts.document(found, title=title, require_time=require_time, command=command))
        print(sentence, file=sys.stderr)
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(title, verdicts.terminal(found), sentence, sep="\n\n", markup=False, highlight=False)
    else:
        _emit(f"{title}\n\n{verdicts.table(found)}\n{sentence}\n")
    try:
        if in_step_summary:
            page = verdicts.markdown(found, title=title, require_time=require_time, command=command)
            report.append_step_summary(page)
    except UsageError as error:  # the verdict stands
        _tell(f"kvbench: {error}")
    raise typer.Exit(verdicts.exit_code(found, require_time=require_time))


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
