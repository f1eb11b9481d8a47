"""`kvbench generate`, `kvbench trace` and `kvbench train`: the study note's own steps."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Option

from bench.case import DeviceName
from bench.commands import flags
from bench.commands.output import emit, note, terminal
from bench.commands.values import available_device, thread_count
from bench.errors import FailedRun, UsageError

Prompt = Annotated[str, Option("--prompt", help="Text to continue.")]
Model = Annotated[str, flags.GRID["models"].option()]
Dtype = Annotated[flags.DtypeName, flags.GRID["dtype"].option()]
Threads = Annotated[int | None, flags.GRID["n_threads"].option()]
Device = Annotated[DeviceName, flags.GRID["device"].option()]
Seed = Annotated[int, flags.GRID["seed"].option()]


def generate(
    prompt: Prompt,
    model: Model = "smollm2-135m",
    strategy: Annotated[
        str,
        Option(
            metavar="NAME",
            parser=flags.one_strategy,
            autocompletion=flags.strategies_beginning,
            help="Way to generate; `kvbench run --help` explains each. cache:module:factory for your own cache.",
        ),
    ] = "dynamic",
    n_gen: Annotated[
        int | None,
        Option("-n", "--n-gen", min=1, help="Tokens to generate at most [default: 128, or the model's positions]."),
    ] = None,
    stop_token_id: Annotated[
        int | None, Option(metavar="ID", help="Stop after this token, too [default: end of sequence].")
    ] = None,
    dtype: Dtype = "float32",
    threads: Threads = None,
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Continue a text greedily, with any strategy.

    The continuation alone is written to stdout, token by token. It ends with the model's end-of-sequence token, with
    --stop-token-id, or after --n-gen tokens.

    \b
    Examples:
      kvbench generate --prompt "Lionel Messi is a" -n 16
      kvbench generate --prompt "Lionel Messi is a" --strategy naive
    """
    from bench.study.generate import stream
    from bench.study.prompt import Setting

    setting = Setting(model, dtype, thread_count(threads), available_device(device), seed)
    stream(setting, prompt, strategy=strategy, n_gen=n_gen, stop_token_id=stop_token_id)


def trace(
    prompt: Prompt,
    model: Model = "smollm2-135m",
    strategies: Annotated[
        Any,  # a tuple of names, whose default is written as the user would
        Option(
            metavar="NAMES",
            parser=flags.GRID["strategies"].parse,
            help="Ways to generate, side by side; cache:module:factory for your own cache.",
        ),
    ] = "naive,dynamic",
    n_gen: Annotated[
        int | None, Option("-n", "--n-gen", min=1, help="Steps at most [default: 16, or the model's positions].")
    ] = None,
    until: Annotated[int | None, Option(metavar="TOKEN_ID", help="Stop after this token, as after [EOS].")] = None,
    show_input: Annotated[bool, Option("--show-input", help="Print each step's whole input below the table.")] = False,
    plot: Annotated[Path | None, Option(metavar="FILE", help="Draw the trace to a .png, .svg or .pdf.")] = None,
    picture: Annotated[Literal["masks", "work", "shift", "all"], Option(help="Picture that --plot draws.")] = "all",
    dtype: Dtype = "float32",
    threads: Threads = None,
    device: Device = "cpu",
    seed: Seed = 0,
    output_format: flags.TextFormat = "md",
) -> None:
    """Show generation step by step, with and without a cache.

    T=1 is the prefill: the prompt goes in, one token comes out. From T=2 on naive is fed the whole sequence again, and
    a cached strategy one token.

    \b
    Examples:
      kvbench trace --prompt "Lionel Messi is a" --until 198
      kvbench trace -m DIR --prompt "" --plot trace.png
    """
    from bench.store.derived import Derived
    from bench.study import trace as tracing
    from bench.study import trace_tables
    from bench.study.prompt import Setting

    drawing = None
    if plot is not None:
        import bench.tell.plots  # first: it imports matplotlib without the user's settings  # noqa: F401
        from bench.study import trace_pictures

        drawing = trace_pictures.check(plot, picture)
    setting = Setting(model, dtype, thread_count(threads), available_device(device), seed)
    traced = tracing.run(setting, prompt, strategies=strategies, n_gen=n_gen, until=until)
    if output_format == "json":
        emit(trace_tables.as_json(traced))
    elif sys.stdout.isatty():
        terminal().print(trace_tables.terminal(traced))
    else:
        emit(trace_tables.markdown(traced))
    if show_input and output_format == "md":
        emit(f"\n{trace_tables.inputs(traced)}")
    derived = Derived()
    if drawing is not None:
        with derived.trying(f"--plot {plot}"):
            drawing(traced)
            note(f"plot: {plot}")
    note(*derived.lines())
    if traced.tokens_match == "lossy":
        note("kvbench: other tokens were chosen by lossy strategies only, which may do so")
    elif traced.tokens_match != "true":
        note(f"kvbench: the strategies chose different tokens ({traced.tokens_match})")
    if traced.tokens_match == "false":
        raise typer.Exit(FailedRun.exit_code)
    if derived.lines():
        raise typer.Exit(UsageError.exit_code)


def train(
    text: Annotated[
        Path | None,
        Option(metavar="FILE", help="UTF-8 file with a text per line [default: twelve lines that come along]."),
    ] = None,
    out: Annotated[Path | None, Option(metavar="DIR", help="New folder for the model.")] = None,
    context_length: Annotated[
        int | None, Option(min=2, max=4096, help="Positions of every text, cut or padded [default: 64].")
    ] = None,
    tokenizer: Annotated[
        Literal["word", "bpe"] | None, Option(help="Kind of tokenizer, made from the text [default: word].")
    ] = None,
    steps: Annotated[int | None, Option(min=1, help="Optimizer steps [default: 80].")] = None,
    seed: Annotated[
        int | None, Option(min=0, max=2**32 - 1, help="Seed of the weights and of the order [default: 0].")
    ] = None,
    threads: Threads = None,
    resume: Annotated[Path | None, Option(metavar="DIR", help="Continue a training that was interrupted.")] = None,
    output_format: flags.TextFormat = "md",
) -> None:
    """Train a small GPT-2 on a text, as in the tutorial.

    Each line stands between [SOS] and [EOS], each token predicts the next, and all have one static shape. The result is
    an ordinary checkpoint folder that every other command takes as --model DIR; DIR/loss.png is its loss curve.

    \b
    Examples:
      kvbench train --out love
      kvbench generate -m love --prompt ""
      kvbench train --resume love
    """
    from bench.study import train as training
    from kvcache.learn.training_folder import Settings

    flags_given = {"context_length": context_length, "tokenizer": tokenizer, "steps": steps, "seed": seed}
    chosen: dict[str, Any] = {name: value for name, value in flags_given.items() if value is not None}
    if resume is not None:
        if chosen or any(value is not None for value in (text, out, threads)):
            raise UsageError("--resume continues the training as it was begun: leave out every flag but -o")
        folder = resume
    elif out is None:
        raise UsageError("--out: give a new folder for the model, or --resume with the folder of a training")
    else:
        training.begin(out, text, Settings(n_threads=thread_count(threads), **chosen))
        folder = out
    outcome = training.train(folder)
    emit(training.render(outcome, folder, output_format))
    if advice := training.advice(outcome):
        note(f"kvbench: {advice}")
