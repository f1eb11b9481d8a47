"""The flags of `kvbench run` that have its groups measured by jobs of a cluster."""

import shlex
from typing import Annotated, Literal

import typer
from typer import Option

from bench.commands import config
from bench.errors import UsageError
from bench.manifest import Cluster

KindName = Literal["slurm", "local", "files"]
Kind = Annotated[
    KindName | None,
    Option(
        "--cluster",
        help="Measure each group (model, dtype, threads) in a job of its own: slurm takes a whole node for each, local "
        "runs one after another here, for trying it (both need kvbench[cluster]); files only writes what "
        "`kvbench job FILE` measures, for any other scheduler.",
    ),
]
Partition = Annotated[str | None, Option("--slurm-partition", metavar="NAME", help="Partition of the jobs.")]
Constraint = Annotated[
    str | None, Option("--slurm-constraint", metavar="FEATURES", help="Features that their nodes must have.")
]
Time = Annotated[
    int, Option("--slurm-time", metavar="MINUTES", min=1, help="Time that a job may take; --resume adds what it lacks.")
]
Parallel = Annotated[
    int | None,
    Option("--slurm-parallel", metavar="N", min=1, help="The most jobs that run at a time [default: all of them]."),
]
Options = Annotated[
    str | None,
    Option(
        "--slurm-options",
        metavar="WORDS",
        help='Other options of sbatch, as in "account=physics gres=gpu:1".',
    ),
]
_FIELDS = {f"slurm_{field.removesuffix('_min')}": field for field in Cluster.__struct_fields__ if field != "kind"}
PARAMETERS = ("cluster", *_FIELDS)
"""The parameters of the command that have these flags."""


def cluster_of(context: typer.Context, stored: Cluster | None, *, resumed: bool) -> Cluster | None:
    """Return how jobs are to be started; None where the command measures by itself.

    A run that is `resumed` goes on as it has `stored`, but for what the command line says; a file says nothing of it.

    Raises:
        UsageError: a flag of Slurm is given without it, or an option of sbatch is none.
    """
    given = config.given(context) if resumed else set(PARAMETERS)
    kind: KindName | None = context.params["cluster"] if "cluster" in given else None
    kind = kind or (stored.kind if stored is not None else None)
    if kind != "slurm" and (lone := config.given(context).intersection(_FIELDS)):
        flag = config.flag_of(context, min(lone))
        raise UsageError(f"{flag}: is for jobs in Slurm; add --cluster slurm, or leave it out")
    if kind is None:
        return None
    values = {field: context.params[name] for name, field in _FIELDS.items() if name in given}
    if isinstance(values.get("options"), str):
        values["options"] = _options(values["options"])
    known = {} if stored is None else {field: getattr(stored, field) for field in _FIELDS.values()}
    return Cluster(kind=kind, **{name: value for name, value in (known | values).items() if value is not None})


def _options(text: str) -> dict[str, str]:
    """Return the options of sbatch that `text` lists, by their long names."""
    options = {}
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"--slurm-options {text}: {error}") from error
    for word in words:
        name, _, value = word.removeprefix("--").partition("=")
        if not name or not value:
            raise UsageError(f'--slurm-options {word}: give NAME=VALUE, as in "account=physics gres=gpu:1"')
        options[name] = value
    return options
