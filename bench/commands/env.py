"""`kvbench env`: this machine and its ceilings."""

from typing import Annotated

from typer import Option

from bench.commands import flags
from bench.commands.output import emit, note


def env(
    output_format: flags.TextFormat = "md",
    ceilings: Annotated[
        bool, Option("--ceilings/--no-ceilings", help="Measure read bandwidth and GEMM rate (takes seconds).")
    ] = True,
) -> None:
    """Show this machine, its software and its speed.

    The fields are those that a run stores. The ceilings are what MBU and MFU are shares of: the fastest of several
    kernels, with one thread and with all, in float32 and bfloat16. They vary with the load of the machine and with how
    much is read, so a run measures them again beside its cases, at their own sizes.

    \b
    Examples:
      kvbench env
      kvbench env -o json --no-ceilings        plain numbers, in bytes
    """
    from bench.machine.affinity import notice
    from bench.machine.environment import read_environment
    from bench.measure import ceiling_turns
    from bench.measure.server_process import RunServers
    from bench.tell.environment import render

    environment = read_environment()
    about_threads = notice({1, environment.cores}, environment.thread_variables)
    if about_threads is not None:
        note(about_threads)
    measured = []
    if ceilings:
        with RunServers() as servers:
            settings = ceiling_turns.settings_here(environment)
            measured = ceiling_turns.survey(settings, lambda n_threads: servers.fork("", n_threads), note)
    emit(render(environment, output_format, measured))
