"""A job is one run, from its plan to its last sample, new or resumed."""

import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from bench.case import Sweep
from bench.errors import DataError, UsageError, blaming
from bench.machine.affinity import notice, user_variables
from bench.machine.devices import DEVICES
from bench.machine.environment import read_environment
from bench.machine.places import require_temporary_bytes
from bench.manifest import SCHEMA_VERSION, CasePlan, Cluster, Manifest
from bench.measure import plan as planning
from bench.measure.budget import START_S, Reduction, fit, reduced, seconds_of
from bench.measure.ceiling_turns import CEILINGS, settings_of, survey
from bench.measure.own_text import read_text
from bench.measure.plan import Limits
from bench.measure.progress import ProgressBar
from bench.measure.resume import pending_cells
from bench.measure.schedule import measure as measure_cases
from bench.measure.server_process import RunServers
from bench.naming import namer, plural
from bench.record import Run
from bench.store.job_files import by_group
from bench.store.run_folder import check_name, find_run, locked, make_folder, read_run, samples_file, write_manifest
from kvcache import models


@dataclass(frozen=True)
class Job:
    """What is to be measured, and where it goes. `previous` holds what an interrupted run measured already."""

    manifest: Manifest
    out: Path
    previous: Run | None = None
    ceilings: bool = True
    """Whether a new run measures the machine's ceilings; a resumed one goes on as it began."""

    @property
    def limits(self) -> Limits:
        """How much is measured."""
        return Limits.of(self.manifest)


@contextmanager
def noting(what_is_kept: str, *, unless: type[BaseException] | tuple[()] = ()) -> Iterator[None]:
    """Note on whatever ends the run early, an interruption too, what is kept of it, but for errors of `unless`."""
    try:
        yield
    except unless:
        raise
    except BaseException as error:
        error.add_note(what_is_kept)
        raise


NOTHING_KEPT = "nothing was measured yet, so nothing is kept"


@noting(NOTHING_KEPT, unless=UsageError)  # what is refused before anything ran keeps nothing, of course
def plan(
    sweeps: Sequence[Sweep],
    limits: Limits,
    out: Path,
    name: str | None,
    text: Path | None = None,
    cluster: Cluster | None = None,
    kernels: dict[str, str] | None = None,
) -> Job:
    """Plan a new job for a grid, whose lossy strategies are judged over `text`. Nothing is written yet.

    With `cluster` its groups will be measured elsewhere, each by a job of its own. `kernels` are those that it is
    pinned to.

    Raises:
        UsageError: the grid, a model, the name, the text or the machine's memory does not allow it.
    """
    planned = planning.plan(sweeps)
    text_file = read_text(text, planned) if text is not None else None
    if cluster is None:  # else each job looks on its own machine
        refuse_too_large(planned)
    for model, attention in dict.fromkeys(
        (model, sweep.attn_implementation) for sweep in sweeps for model in sweep.models
    ):
        for caution in planning.describe(model, attention).cautions:
            print(f"kvbench: {model}: {caution}", file=sys.stderr, flush=True)
    case_name = namer(item.case for item in planned)
    for item in planned:
        if item.unpredicted is not None:
            print(f"kvbench: no costs of {case_name(item.case)}: {item.unpredicted}", file=sys.stderr, flush=True)
    created = datetime.now(UTC)
    stamp = created.strftime("%Y%m%dT%H%M%SZ")
    weights = {}
    for model in dict.fromkeys(item.case.model for item in planned):
        try:
            weights[model] = models.weights_digest(model, seed=planned[0].case.seed)
        except models.ModelError as error:
            raise UsageError(blaming("--model", model, error)) from error
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        run_id=f"{stamp}-{check_name(name) if name is not None else created.strftime('%f')}",
        created_utc=created.isoformat(timespec="seconds"),
        command=["kvbench", *sys.argv[1:]],
        repetitions=limits.repetitions,
        processes=limits.processes,
        timeout_s=limits.timeout_s,
        budget_min=limits.budget_min,
        environment=read_environment(),
        plan=planned,
        weights=weights,
        text=text_file,
        cluster=cluster,
        kernels=kernels,
    )
    return Job(manifest, out)


def resume(run: str, out: Path) -> Job:
    """Plan to go on with an interrupted run, with what it measured already.

    Raises:
        DataError: there is no such run, it is damaged, it was measured on another machine or with other software, or a
            model of it is gone.
    """
    previous = read_run(find_run(run, out))
    there, here = previous.manifest.environment.fingerprint, read_environment().fingerprint
    changed = [f"{name} was {there[name]}, is {here[name]}" for name in there if there[name] != here[name]]
    for model, digest in previous.manifest.weights.items():
        try:
            found = models.weights_digest(model, seed=previous.manifest.plan[0].case.seed)
        except models.ModelError as error:
            raise DataError(f"{run}: cannot be resumed here: {error}") from error
        if found != digest:
            changed.append(f"the weights of {model} are others")
    if changed:
        raise DataError(f"{run}: cannot be resumed here, its samples would not be comparable: {'; '.join(changed)}")
    return Job(previous.manifest, Path(previous.path).parent, previous)


def estimate(job: Job) -> str:
    """Return the grid and a rough estimate of its time and memory, for `--dry-run`; and what `--budget` takes away."""
    name = namer(item.case for item in job.manifest.plan)
    cluster, limits = job.manifest.cluster, job.limits
    lines = [planning.in_words(item, name, here=cluster is None or cluster.here) for item in job.manifest.plan]
    changes: list[str] = []
    minutes, rounds = [], []
    for plans in _jobs(job):
        cells, reduction = pending_cells(plans, limits, job.previous), _expected_reduction(job, plans)
        changes += [reduced(cell, limits, reduction, name) for cell in cells]
        minutes.append(max(1, math.ceil((START_S + seconds_of(cells, limits, reduction)) / 60)))
        rounds.append(reduction.repetitions)
    if limits.budget_min is not None:
        lines += [f"--budget {limits.budget_min:g}: {change}" for change in dict.fromkeys(filter(None, changes))]
    each = str(min(rounds)) if len(set(rounds)) == 1 else f"{min(rounds)} to {max(rounds)}"
    time = f"{sum(minutes)} min"
    if cluster is not None:
        time = f"{time} in {plural(len(minutes), 'job')}, {max(minutes)} min the longest,"
    memory_gb = planning.memory_bytes(job.manifest.plan) / 1e9
    lines.append(
        f"{len(job.manifest.plan)} cases, {each} rounds each: very roughly {time} "
        f"and at most {memory_gb:.1f} GB of memory"
    )
    return "\n".join(lines)


def case_seconds(job: Job) -> list[float]:
    """Estimate the seconds of each planned case, in the plan's order; 0 for one that is not measured (again)."""
    reductions: dict[str, Reduction] = {}
    for plans in _jobs(job):
        reductions |= dict.fromkeys((item.case.key for item in plans), _expected_reduction(job, plans))
    return [
        seconds_of(pending_cells([item], job.limits, job.previous), job.limits, reductions[item.case.key])
        for item in job.manifest.plan
    ]


def _jobs(job: Job) -> list[list[CasePlan]]:
    """Return what is measured under one budget each: the plan, or that of each job of a cluster run."""
    return [job.manifest.plan] if job.manifest.cluster is None else by_group(job.manifest.plan)


def _expected_reduction(job: Job, plans: Sequence[CasePlan]) -> Reduction:
    """Say what `--budget` is expected to take away from what it is for, before any speed is known."""
    limits = job.limits
    if limits.budget_min is None:
        return Reduction(limits.repetitions)
    return fit(pending_cells(plans, limits, job.previous), limits, 60 * limits.budget_min - START_S)


def measure(job: Job, servers: RunServers) -> Run:
    """Measure what is missing, in workers that `servers` fork, and return the whole run as stored.

    What was measured is on the disk whatever happens; an interruption says how to go on.

    Raises:
        UsageError: the folder cannot be written.
    """
    about_threads = notice({item.case.n_threads for item in job.manifest.plan}, user_variables())
    if about_threads is not None:
        print(f"kvbench: {about_threads}", file=sys.stderr, flush=True)
    if job.previous is not None:
        folder, digest = Path(job.previous.path), job.manifest.digest
    else:
        folder = make_folder(job.out, job.manifest.run_id)
        with noting(NOTHING_KEPT):
            try:
                ceilings = measure_ceilings(job.manifest.plan, servers) if job.ceilings else {}
                job = replace(job, manifest=msgspec.structs.replace(job.manifest, ceilings=ceilings))
                digest = write_manifest(folder, job.manifest).digest
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
    with locked(folder), _kept(folder, new=job.previous is None):
        # Read now that no other process writes to it: one may have gone on with the run after this one planned.
        previous = read_run(folder) if job.previous is not None else None
        with (
            samples_file(folder, digest) as writer,
            ProgressBar("starting the workers and loading the model", "measured in") as progress,
        ):
            plan, text, kernels = job.manifest.plan, job.manifest.text, job.manifest.kernels
            measure_cases(plan, job.limits, writer, progress, servers.fork, previous, text, kernels)
    return read_run(folder)


@contextmanager
def _kept(folder: Path, *, new: bool) -> Iterator[None]:
    """Note on whatever ends the run early how to go on; a new run that is refused before it has any result is removed.

    Only for a folder that this process has locked: another may be measuring into it otherwise.
    """
    go_on = f"go on with: kvbench run --resume {folder}"
    try:
        yield
    except UsageError as error:
        run = read_run(folder)
        if not new or run.samples or run.checks or run.failures or run.ceilings or run.texts:
            error.add_note(f"what was measured is kept, {go_on}")
            raise
        shutil.rmtree(folder)
        raise UsageError(f"{error}; {NOTHING_KEPT}") from None
    except BaseException as error:
        error.add_note(f"what was measured is kept, {go_on}")  # first: a second Ctrl-C may end what follows
        with suppress(Exception):  # a disk that fails is the error itself
            if not read_run(folder).samples:
                error.__notes__[-1] = f"what was measured is kept (no case yet), {go_on}"
        raise


def measure_ceilings(plans: Sequence[CasePlan], servers: RunServers) -> dict[str, float]:
    """Measure the machine's ceilings under the settings of `plans`, by `Ceiling.name`; none where one cannot be."""
    settings = settings_of(plans)
    model = plans[0].case.model  # so that the server goes on to fork the workers of the cases
    print("measuring the machine's ceilings", file=sys.stderr, flush=True)
    found = survey(
        settings,
        lambda n_threads: servers.fork(model, n_threads),
        lambda text: print(text, file=sys.stderr, flush=True),
    )
    if len(found) < len(settings) * len(CEILINGS):
        print("MFU, MBU and predictions will be empty", file=sys.stderr, flush=True)
        return {}
    return {ceiling.name: ceiling.per_s for ceiling in found}


def refuse_too_large(planned: Sequence[CasePlan]) -> None:
    """Raise UsageError if this machine lacks the memory, or the space for temporary files, that a plan needs."""
    require_temporary_bytes(planning.temporary_bytes(planned))
    available = DEVICES[planned[0].case.device].available_memory_bytes()
    needed = planning.memory_bytes(planned)
    if available is not None and needed > available:
        raise UsageError(
            f"this grid needs about {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are free: choose a "
            "smaller --model, fewer --strategies, a smaller --batch-size or shorter --n-prompt"
        )
