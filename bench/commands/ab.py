"""`kvbench ab`: a verdict between two revisions or two environments."""

from typing import Annotated

from typer import Argument, Option

from bench.commands import flags
from bench.commands.output import note, print_ab


@flags.takes_grid(strategies="naive,dynamic", n_prompt="128", n_gen="32")
def ab(
    grid: flags.Grid,
    base: Annotated[str | None, Argument(metavar="[BASE]", help="Git revision to compare with.")] = None,
    head: Annotated[
        str | None, Argument(metavar="[HEAD]", help="Git revision to judge [default: the working tree as it is].")
    ] = None,
    base_python: Annotated[str | None, Option(metavar="FILE", help="Python interpreter of base's environment.")] = None,
    head_python: Annotated[str | None, Option(metavar="FILE", help="Python interpreter of head's environment.")] = None,
    base_env: Annotated[
        list[str] | None, Option(metavar="NAME=VALUE", help="Environment variable for base; may be repeated.")
    ] = None,
    head_env: Annotated[
        list[str] | None, Option(metavar="NAME=VALUE", help="Environment variable for head; may be repeated.")
    ] = None,
    threshold: Annotated[
        float, Option(min=1e-4, max=0.99, help="Share up to which a change counts as none: 0.03 is three percent.")
    ] = 0.03,
    budget: Annotated[float, Option(metavar="MINUTES", min=1e-3, max=1e5, help="Time that all of it may take.")] = 10.0,
    timeout: Annotated[float, Option(metavar="SECONDS", min=1, max=1e6, help="Time that a request may take.")] = 900.0,
    kernels: flags.Kernels = None,
    out: flags.Out = flags.RESULTS,
    name: Annotated[str | None, Option(help="Name of its folder, appended to the timestamp.")] = None,
    output_format: flags.TextFormat = "md",
) -> None:
    """Judge HEAD against BASE, measured in turns.

    BASE and HEAD are two revisions of this repository, or two environments. Each side runs its own checkout in its own
    processes. Every case is screened; what looks different is confirmed in fresh processes with fresh prompts, until
    all is decided or --budget is spent. A change near --threshold may be judged either way. Exit codes: 0 nothing is
    slower, 1 regression, 3 the sides cannot be compared or one cannot run a case, 4 undecided, 5 head fails or emits
    other tokens, or neither side supports any case.

    \b
    Examples:
      kvbench ab main                                    the working tree against main
      kvbench ab v0.1.0 HEAD -m py:my_model:build        two revisions of your model
      kvbench ab --head-python new/bin/python            two environments
    """
    from bench.ab import run as abtest
    from bench.ab.record import Settings
    from bench.ab.sides import sides as both_sides
    from bench.machine.places import current_folder

    settings = Settings(threshold=threshold, budget_s=60 * budget, timeout_s=timeout)
    sweeps = flags.sweeps("default", grid, pinned=kernels is not None)
    pythons, variables = {"base": base_python, "head": head_python}, {"base": base_env or [], "head": head_env or []}
    with both_sides(base, head, pythons=pythons, variables=variables, here=current_folder()) as (old, new):
        folder = abtest.compare(old, new, sweeps, settings, out, name, note, kernels)
    note(str(folder))
    print_ab(folder, output_format)
