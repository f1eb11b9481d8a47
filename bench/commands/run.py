"""`kvbench run`: measures a grid and prints its table."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from bench.commands import cluster_flags, config, flags
from bench.commands.output import ask, emit, note, print_plan, print_summary
from bench.errors import FailedRun, UsageError
from bench.manifest import JOB_MINUTES, Cluster
from bench.measure.plan import Limits

if TYPE_CHECKING:
    from bench.measure.run import Job

BUDGET_MIN = {"default": 8.0}
"""Minutes that a preset may take unless --budget is given; others, `smoke` above all, are measured whole."""
WITH_RESUME = {"resume", "out", "output_format", "dry_run", *cluster_flags.PARAMETERS}
"""The flags that make sense beside --resume: the others were settled when the run began."""


@flags.takes_grid()
def run(
    context: typer.Context,
    *,
    preset: Annotated[
        flags.PresetName, Option(help="Prepared grid, changed by flags that are given; see below.")
    ] = "default",
    grid: flags.Grid,
    repetitions: Annotated[
        int, Option("-r", "--repetitions", metavar="N", min=1, help="Rounds; six or more give intervals.")
    ] = Limits.repetitions,
    processes: Annotated[int, Option(metavar="N", min=1, help="Fresh processes per strategy.")] = Limits.processes,
    budget: Annotated[
        float | None,
        Option(
            "--budget",
            metavar="MINUTES",
            min=0.1,
            max=1e5,
            help="Time that the run may take: the plan is reduced to fit [default: 8 for --preset default].",
        ),
    ] = None,
    timeout: Annotated[
        float, Option(metavar="SECONDS", min=1, max=1e6, help="Time that a case may take in a process.")
    ] = Limits.timeout_s,
    text: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            help="Judge lossy strategies over this text (UTF-8), not over one that the model writes itself.",
        ),
    ] = None,
    kernels: flags.Kernels = None,
    ceilings: Annotated[
        bool,
        Option("--ceilings/--no-ceilings", help="Measure the machine's read bandwidth and GEMM rate beside the cases."),
    ] = True,
    out: flags.Out = flags.RESULTS,
    name: Annotated[str | None, Option(help="Name of the run folder, appended to the timestamp.")] = None,
    resume: Annotated[
        str | None, Option(metavar="RUN", help="Continue an interrupted run: measure only what it lacks.")
    ] = None,
    cluster: cluster_flags.Kind = None,
    slurm_partition: cluster_flags.Partition = None,
    slurm_constraint: cluster_flags.Constraint = None,
    slurm_time: cluster_flags.Time = JOB_MINUTES,
    slurm_parallel: cluster_flags.Parallel = None,
    slurm_options: cluster_flags.Options = None,
    config_file: config.ConfigFile = None,
    output_format: flags.TableFormat = "md",
    dry_run: Annotated[
        bool, Option("--dry-run", help="Print the cases and a rough estimate of the time; measure nothing.")
    ] = False,
) -> None:
    """Measure a grid of cases and print the table.

    Comma-separated values make a grid; what is not given comes from the preset. Samples, tables and plots are written
    to a run folder, whose path is printed last.

    \b
    Examples:
      kvbench run --preset smoke                        a first look, about a minute
      kvbench run -m random:gpt2 -p 64,256 -n 16        your own grid
      kvbench run --strategies naive,dynamic -b 1,4     two strategies, two batch sizes
      kvbench run --dry-run -o csv                      the cases, nothing measured
      kvbench run --config ci.toml                      a grid from a file
      kvbench run --resume RUN                          go on after Ctrl-C
      kvbench run --cluster slurm -t 8                  each group a job in Slurm
      kvbench run --cluster files -t 8                  job files for another scheduler

    \b
    A TOML file (--config), or [tool.kvbench] in ./pyproject.toml, holds long flags:
      model = "random:gpt2"
      n-prompt = [64, 256]
      repetitions = 12
    """
    from bench.measure import cluster_run
    from bench.measure import run as measuring
    from bench.measure.cluster import refuse_unavailable
    from bench.measure.plan import within_positions
    from bench.measure.server_process import RunServers
    from bench.store.job_files import FOLDER

    if resume is not None and (given := config.given(context) - WITH_RESUME):
        named = ", ".join(config.flag_of(context, parameter) for parameter in sorted(given))
        raise UsageError(f"--resume continues the run as it was planned: leave out {named}")
    missing: list[str] = []
    stored = cluster_run.stored_cluster(resume, out) if resume is not None else None
    jobs = cluster_flags.cluster_of(context, stored, resumed=resume is not None)
    if jobs is not None and not dry_run:
        refuse_unavailable(jobs.kind)
    with RunServers() as servers:
        if resume is not None:
            job = _resumed(resume, out, jobs, stored)
        else:
            sweeps = flags.sweeps(preset, grid, here=jobs is None or jobs.here, pinned=kernels is not None)
            if jobs is None and not dry_run:
                servers.start(sweeps[0].models[0], sweeps[0].n_threads[0])  # it imports torch while this process plans
            if "n_prompt" not in grid:
                sweeps = within_positions(sweeps, note)
            budget_min = BUDGET_MIN.get(preset) if budget is None else budget
            limits = Limits(repetitions=repetitions, processes=processes, timeout_s=timeout, budget_min=budget_min)
            job = replace(measuring.plan(sweeps, limits, out, name, text, jobs, kernels), ceilings=ceilings)
        if dry_run:
            print_plan(job, output_format)
            return
        if jobs is not None and jobs.kind == "files":
            folder, written = cluster_run.write_jobs(job)
            note(f"job files to measure, each by `kvbench job FILE`: {len(written)} in {folder / FOLDER}")
            emit(f"{folder}\n")
            return
        if jobs is None:
            finished = measuring.measure(job, servers)
        else:
            finished, missing = cluster_run.measure(job, ask)
    with measuring.noting(f"what was measured is kept in {finished.path}"):
        print_summary(finished, output_format)
    if missing:
        raise FailedRun(f"not finished: {', '.join(missing)}; go on with: kvbench run --resume {finished.path}")


def _resumed(run: str, out: Path, jobs: Cluster | None, stored: Cluster | None) -> "Job":
    """Plan to go on with a run, by `jobs` where it was begun by such."""
    from bench.measure import cluster_run
    from bench.measure import run as measuring

    if jobs is None:
        return measuring.resume(run, out)
    if stored is None:
        raise UsageError(f"--cluster: {run} was begun without jobs, so it is resumed without them")
    return cluster_run.resume(run, out, jobs)
