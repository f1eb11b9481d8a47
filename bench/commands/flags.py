"""The flags that span a grid: one row each. `run`, `ab`, their help and the text of the presets are made of this table.

A mistake is one line that names the flag and what is valid: a parser here says what is wrong with the value, and
`bench.cli` puts the flag before it.
"""

import functools
import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args

import msgspec
from typer import BadParameter, Option

from bench.case import HOST, HOST_DEVICES, PRESETS, DeviceName, NaiveLogits, Sweep
from bench.commands.values import available_device, integers, thread_count, unknown, words
from bench.errors import UsageError
from bench.tell.formats import DocumentFormat, Format
from kvcache.compiled import candidates
from kvcache.models import ATTN_IMPLEMENTATIONS, DTYPES
from kvcache.models.random_weights import GEOMETRIES
from kvcache.strategies.catalogue import OWN, PREFILLING_AS_STORED, STRATEGIES

if TYPE_CHECKING:  # mypy takes no Literal of a table's keys; typer checks words against it and completes them
    PresetName = str
    StrategyName = str
    DtypeName = str
    AttentionName = str
else:
    PresetName = Literal[*PRESETS]
    StrategyName = Literal[*STRATEGIES]
    DtypeName = Literal[*DTYPES]
    AttentionName = Literal[*ATTN_IMPLEMENTATIONS]

Grid = dict[str, Any]
"""Field of `Sweep` -> value, for the flags that were given."""


class GridFlag(NamedTuple):
    """A flag that sets one field of `Sweep`."""

    field: str
    names: tuple[str, ...]
    """The spellings, the short one first."""
    value: Any
    """Type of one value: str, int, bool (a switch) or a Literal."""
    help: str
    least: int | None = None
    """The smallest integer that is valid."""
    most: int | None = None
    prefix: str | None = None
    """A value that begins so is valid besides those of the Literal."""
    many: bool = True
    """Whether it takes a comma-separated list, as the field does."""

    def option(self, *, many: bool = False) -> Any:
        """Return typer's option for this flag, of one value or (`many`) of a list."""
        if not many:
            return Option(*self.names, help=self.help, min=self.least, max=self.most)
        metavar = "INTEGERS" if self.value is int else "NAMES"
        return Option(*self.names, help=f"{self.help} A list makes a grid.", parser=self.parse, metavar=metavar)

    def parse(self, text: str) -> tuple[Any, ...]:
        """Return the values of a comma-separated list.

        Raises:
            typer.BadParameter: a value is not valid, empty, or given twice.
        """
        if self.value is int:
            return integers(text, self.least or 0)
        return words(text, get_args(self.value), self.prefix)


GRID: dict[str, GridFlag] = {
    flag.field: flag
    for flag in (
        GridFlag(
            "models",
            ("-m", "--model"),
            str,
            f"Model: smollm2-135m; random:NAME with seeded weights ({', '.join(GEOMETRIES)}); a folder with "
            "safetensors or one GGUF file; py:module:factory for your own code; or an id on the Hugging Face hub.",
        ),
        GridFlag(
            "strategies",
            ("--strategies",),
            StrategyName,
            "Ways to generate, explained below; cache:module:factory for your own cache.",
            prefix=OWN,
        ),
        GridFlag("n_prompt", ("-p", "--n-prompt"), int, "Prompt length in tokens.", least=1),
        GridFlag("n_gen", ("-n", "--n-gen"), int, "Tokens to generate.", least=1),
        GridFlag("n_depth", ("-d", "--n-depth"), int, "Tokens in the cache before the prompt, not timed.", least=0),
        GridFlag("batch_size", ("-b", "--batch-size"), int, "Sequences in a batch.", least=1),
        GridFlag("dtype", ("--dtype",), DtypeName, f"Data type of the weights: {', '.join(DTYPES)}."),
        GridFlag("n_threads", ("-t", "--threads"), int, "CPU threads; all cores unless given.", least=1),
        GridFlag("device", ("--device",), DeviceName, "Device to measure on.", many=False),
        GridFlag(
            "attn_implementation",
            ("--attn-implementation",),
            AttentionName,
            "Attention code of transformers; sdpa, where the model has it, unless given.",
            many=False,
        ),
        GridFlag(
            "naive_logits",
            ("--naive-logits",),
            NaiveLogits,
            "Positions for which naive computes logits: the last one (a fair comparison), or all (the textbook loop).",
            many=False,
        ),
        GridFlag(
            "prefill_quantized",
            ("--prefill-quantized",),
            bool,
            "The prompt attends to its own keys and values as they are stored, that is, rounded "
            f"({', '.join(sorted(PREFILLING_AS_STORED))}).",
            many=False,
        ),
        GridFlag(
            "seed", ("--seed",), int, "Seed of the prompts and of random weights.", least=0, most=2**63 - 1, many=False
        ),
    )
}


def pinned_kernels(text: str) -> dict[str, str]:
    """Return the kernels that `--kernels` names.

    Raises:
        typer.BadParameter: there is no such file, or it names no kernels.
    """
    try:
        return candidates.pinned(text)
    except candidates.InvalidKernels as error:
        raise BadParameter(str(error)) from error


Kernels = Annotated[
    Any,  # a dict, of which typer would make an option of its own
    Option(
        "--kernels",
        metavar="FILE|default",
        parser=pinned_kernels,
        help="Kernels of the compiled strategies on a CPU: those of a file in the cache folder (kernels-*.json) or of "
        "a baseline's session, or the defaults; the fastest here unless given.",
    ),
]
Out = Annotated[Path, Option("--out", help="Folder of run folders.")]
TableFormat = Annotated[Format, Option("-o", "--format", help="Format of the table on stdout.")]
TextFormat = Annotated[DocumentFormat, Option("-o", "--format", help="Format of the output on stdout.")]
RESULTS = Path("results/runs")

CORRECTNESS = (
    "An exact strategy whose logits differ from those of one forward over the whole text by more than rounding fails "
    "and is not timed; if only tokens differ, the result is `tie`. A lossy one is timed and judged."
)
"""The rule, in the words of the README."""

NAMING = (
    "A case is named by its strategy and prompt: `dynamic, prompt 512 @ 2048` has 2,048 tokens in the cache before the "
    "prompt."
)
"""The names of cases in tables, plots and progress, in the words of the README."""


def one_strategy(text: str) -> str:
    """Return the name of one strategy, of the catalogue or the user's own.

    Raises:
        typer.BadParameter: it is unknown, or a list.
    """
    names: tuple[str, ...] = GRID["strategies"].parse(text)
    if len(names) > 1:
        raise BadParameter(unknown(text, STRATEGIES))
    return names[0]


def strategies_beginning(incomplete: str) -> list[str]:
    """List the names of the catalogue that begin with what was typed, for the shell's completion."""
    return [name for name in STRATEGIES if name.startswith(incomplete)]


def takes_grid(**defaults: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command every flag of the table where its parameter `grid` stands; it gets those that have a value.

    `defaults` are the words that a flag takes where it is not given; others are then left to the preset.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def with_grid(**arguments: Any) -> None:
            values = {field: arguments.pop(field) for field in GRID}
            command(grid={field: value for field, value in values.items() if value is not None}, **arguments)

        signature = inspect.signature(command, eval_str=True)
        parameters: list[inspect.Parameter] = []
        for parameter in signature.parameters.values():
            rows = [_parameter(flag, defaults.get(flag.field)) for flag in GRID.values()]
            parameters += rows if parameter.name == "grid" else [parameter.replace(kind=parameter.KEYWORD_ONLY)]
        with_grid.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # for typer
        return with_grid

    return decorate


def _parameter(flag: GridFlag, default: str | None) -> inspect.Parameter:
    annotated: Any = Annotated  # mypy takes no type that is made at run time
    annotation = annotated[tuple if flag.many else flag.value, flag.option(many=flag.many)]
    return inspect.Parameter(flag.field, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def sweeps(preset: str, grid: Grid, *, here: bool = True, pinned: bool = False) -> tuple[Sweep, ...]:
    """Return the sweeps of a preset with the values of `grid` in place of their own.

    They are measured `here`, or on machines of which nothing is known; `pinned` says that --kernels was given.

    Raises:
        UsageError: this machine has no such device, or fewer cores than threads; the threads of another machine are
            not given; no strategy supports --prefill-quantized; or there is nothing to pin.
    """
    if pinned and (device := grid.get("device", HOST)) not in HOST_DEVICES:
        raise UsageError(f"--kernels: on {device} there is no choice, F.linear computes every product; leave it out")
    if here:
        available_device(grid.get("device", HOST))
        chosen = grid | {"n_threads": tuple(map(thread_count, grid.get("n_threads", (None,))))}
    elif "n_threads" in grid:
        chosen = grid
    else:
        raise UsageError("--threads: give it with --cluster, since the cores of other machines are not known here")
    made = tuple(dict.fromkeys(msgspec.structs.replace(sweep, **chosen) for sweep in PRESETS[preset]))
    if grid.get("prefill_quantized") and not any(PREFILLING_AS_STORED.intersection(sweep.strategies) for sweep in made):
        known = " or ".join(sorted(PREFILLING_AS_STORED))
        raise UsageError(f"--prefill-quantized: no strategy of the grid supports it; add {known} to --strategies")
    return made


def sweep_flags(sweep: Sweep) -> list[str]:
    """Return the flags that make `sweep` of the preset `default`; for that preset itself, every flag with a value."""
    default = msgspec.structs.asdict(Sweep())
    return [
        f"{GRID[field].names[0]} {','.join(map(str, value)) if isinstance(value, tuple) else value}".removesuffix(
            " True"
        )
        for field, value in msgspec.structs.asdict(sweep).items()
        if (value != default[field] or sweep == Sweep()) and value not in ((), "") and value is not False
    ]


def below_the_flags() -> str:
    """Return what the help of `run` ends with: strategies, presets, the rule of correctness, the names of cases."""
    strategies = {name: [entry.summary] for name, entry in STRATEGIES.items()}
    presets = {name: [" ".join(sweep_flags(sweep)) for sweep in grids] for name, grids in PRESETS.items()}
    blocks = [
        _listed("Strategies:", strategies),
        _listed("Presets, as the flags that differ from those of `default`; a line is a grid:", presets),
        CORRECTNESS,
        NAMING,
    ]
    return "\n\n".join(blocks)


def _listed(title: str, rows: dict[str, list[str]]) -> str:
    """Make a block of the help in two columns of 78 characters, kept as it is by the backspace before it."""
    width = max(map(len, rows)) + 4
    lines = [title]
    for name, texts in rows.items():
        start = f"  {name}".ljust(width)
        for text in texts:
            wrapped = textwrap.wrap(
                text, 78, initial_indent=start, subsequent_indent=" " * (width + 2), break_on_hyphens=False
            )
            lines += wrapped
            start = " " * width
    return "\n".join(["\b", *lines])
