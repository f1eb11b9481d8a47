"""`kvbench fit`: the largest context that a memory holds, or the largest batch, for each kind of cache."""

import re
from typing import Annotated

from typer import BadParameter, Option

from bench.commands import flags
from bench.commands.output import emit, note
from bench.commands.values import thread_count
from bench.errors import UsageError

_BATCH = "Sequences in a batch; of a list each has rows of its own [default: 1]."
_UNITS = {"": 1} | {f"{prefix}B": 1000**power for power, prefix in enumerate("kMGT", 1)}
_UNITS |= {f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", 1)}


def size(text: str) -> int:
    """Return the bytes of a size such as `16GiB`, `24GB` or `512MiB`.

    Raises:
        BadParameter: it is none, or 0.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *(\w*)", text.strip())
    units = {unit.lower(): factor for unit, factor in _UNITS.items()}
    if found is None or found[2].lower() not in units or float(found[1]) <= 0:
        raise BadParameter(f"{text}: give a size as in 16GiB, 24GB or 512MiB")
    return int(float(found[1]) * units[found[2].lower()])


def fit(
    model: Annotated[str, flags.GRID["models"].option()] = "smollm2-135m",
    memory: Annotated[
        int | None,
        Option("--memory", parser=size, metavar="SIZE", help="Memory, as in 16GiB [default: all of this machine's]."),
    ] = None,
    batch_size: Annotated[
        tuple | None,  # type: ignore[type-arg]  # typer takes a plain class
        Option(*flags.GRID["batch_size"].names, parser=flags.GRID["batch_size"].parse, metavar="INTEGERS", help=_BATCH),
    ] = None,
    context: Annotated[
        int | None,
        Option("--context", min=1, help="Tokens of each sequence: find the largest batch instead [default: none]."),
    ] = None,
    dtype: Annotated[flags.DtypeName, flags.GRID["dtype"].option()] = "float32",
    strategies: Annotated[
        tuple | None,  # type: ignore[type-arg]  # typer takes a plain class
        Option(parser=flags.GRID["strategies"].parse, metavar="NAMES", help="Kinds of cache [default: all]."),
    ] = None,
    n_threads: Annotated[int | None, flags.GRID["n_threads"].option()] = None,
    ceilings: Annotated[
        bool,
        Option("--ceilings/--no-ceilings", help="Measure this machine's speed to predict tokens per second (seconds)."),
    ] = True,
    output_format: flags.TableFormat = "md",
) -> None:
    """Find the largest context or batch that fits a memory.

    For each kind of cache: adds up the weights, every byte that the cache allocates for a prompt fed in one forward,
    and an estimate of the workspace. Nothing is loaded or run. Tokens per second are those of decode at that context
    if it reached the machine's ceilings: an upper limit.

    \b
    Examples:
      kvbench fit -m smollm2-135m --memory 2GiB
      kvbench fit -m ./my-model --memory 16GiB -b 1,8 --dtype bfloat16
      kvbench fit -m smollm2-135m --memory 16GiB --context 2048
      kvbench fit -m random:gpt2 -o csv --no-ceilings
    """
    from bench.machine.environment import read_environment
    from bench.measure.fit import fits, rates_here
    from bench.measure.plan import describe
    from bench.tell.fit import render
    from kvcache.strategies.catalogue import REFEEDING, STRATEGIES, YARDSTICKS

    here = read_environment()
    memory_bytes = memory or here.memory_limit_bytes or here.memory_bytes
    chosen = strategies or tuple(name for name in STRATEGIES if name not in REFEEDING | YARDSTICKS)
    if refeeding := REFEEDING.intersection(chosen):
        raise UsageError(f"--strategies {', '.join(refeeding)}: keeps no cache, so memory does not limit its context")
    described = describe(model, "")
    if context is not None and batch_size is not None:
        raise UsageError(f"--context {context} finds the batch: give either it or --batch-size")
    longest = described.max_positions
    if context is not None and longest is not None and context > longest:
        raise UsageError(f"--context {context}: {model} has {longest} positions")
    rates = rates_here(dtype, thread_count(n_threads), note) if ceilings else None
    rows = list(fits(described, chosen, dtype, batch_size or (1,), memory_bytes, rates, context))
    emit(render(rows, output_format, of_batches=context is not None))
