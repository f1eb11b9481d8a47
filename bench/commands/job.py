"""`kvbench job`: measures one job of a cluster run."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument

from bench.commands.output import emit, note
from bench.errors import FailedRun


def job(
    file: Annotated[
        Path, Argument(metavar="FILE", help="Job file, in the folder jobs of a run folder (kvbench run --cluster).")
    ],
) -> None:
    """Measure one job of a cluster run, on this machine.

    A job is one group of the grid (model, dtype, device, threads, attention) with all of its strategies. The samples
    are written to a file of the job's own in the run folder, whose path is printed last. Started again, a job measures
    only what it lacks. Any scheduler can start it.

    \b
    Examples:
      kvbench job results/runs/20261123T040000Z-grid/jobs/job-3.json
      kvbench job "$RUN/jobs/job-$JOB_COMPLETION_INDEX.json"    on Kubernetes
    """
    from bench.measure.jobs import has_failed, measure_job
    from bench.measure.server_process import RunServers

    with RunServers() as servers:
        run = measure_job(file, servers, note)
    emit(f"{run.path}\n")
    if has_failed(run):
        raise typer.Exit(FailedRun.exit_code)
