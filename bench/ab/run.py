"""`kvbench ab`: a verdict between two revisions or two environments, measured interleaved in one go, and stored."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, NamedTuple

import msgspec

from bench.ab import verdicts, worktrees
from bench.ab.conduct import conduct
from bench.ab.pairs import ForkServers, PairMeasurer, Told, server_key
from bench.ab.record import AB_VERSION, MANIFEST, PAIRS, AbManifest, Settings, Side, SideName
from bench.case import HOST_DEVICES, Case, Sweep
from bench.errors import DataError, UsageError
from bench.machine.environment import TorchFacts, read_environment
from bench.measure.plan import refuse_too_long
from bench.measure.run import noting
from bench.record import Environment, Verdict
from bench.store import sealed
from bench.store.checked_lines import Appender
from bench.store.run_folder import check_name


class Finished(NamedTuple):
    """Where an A/B is stored, what was compared with what, and what was found."""

    folder: Path
    title: str
    verdicts: list[Verdict]


def settings(threshold: float, budget_min: float, timeout_s: float) -> Settings:
    """The settings, checked.

    Raises:
        UsageError: one is out of range.
    """
    if not 0 < threshold < 1:  # NaN fails it too
        raise UsageError(f"--threshold {threshold:g}: give a share between 0 and 1, as in 0.03 for three percent")
    if not 0 < budget_min < 1e5:
        raise UsageError(f"--budget {budget_min:g}: give minutes above 0")
    return Settings(threshold=threshold, budget_s=60 * budget_min, timeout_s=timeout_s)


@contextmanager
def sides(
    base: str | None,
    head: str | None,
    *,
    pythons: Mapping[str, str | None],
    variables: Mapping[str, Sequence[str]],
    here: Path,
) -> Iterator[tuple[Side, Side]]:
    """Base and head, checked out where they are revisions.

    Raises:
        UsageError: a revision, an interpreter or a variable is none, or nothing tells base from head.
    """
    if base is None and not any([*pythons.values(), *variables.values()]):
        raise UsageError(
            "BASE: name the revision to compare with, as in `kvbench ab main`, or another environment "
            "(--base-python, --head-python, --base-env, --head-env)"
        )
    with ExitStack() as stack:
        found: list[Side] = []
        names: list[tuple[SideName, str | None]] = [("base", base), ("head", head)]
        for name, revision in names:
            tree, folder, label = None, here, ""
            if base is not None:
                top = worktrees.repository(here)
                if revision is None:
                    tree = stack.enter_context(worktrees.snapshot(top))
                    label = worktrees.describe(top, tree)
                else:
                    sha = worktrees.commit(top, revision, name.upper())
                    tree, label = stack.enter_context(worktrees.checkout(top, sha)), sha[:12]
                folder = tree / here.relative_to(top)
            own = dict(_variable(f"--{name}-env", text) for text in variables[name])
            python = absolute(pythons[name] or sys.executable, here)
            label = ", ".join([*filter(None, [label, pythons[name]]), *map("=".join, own.items())]) or "as it is"
            found.append(
                Side(
                    name=name,
                    label=label,
                    python=python,
                    variables=own,
                    tree=str(tree) if tree is not None else None,
                    folder=str(folder if folder.is_dir() else tree),
                )
            )
        yield found[0], found[1]


def compare(
    base: Side,
    head: Side,
    sweeps: Sequence[Sweep],
    settings: Settings,
    out: Path,
    name: str | None,
    tell: Callable[[str], None],
) -> Finished:
    """Measure until every quantity is decided or the budget is spent.

    Raises:
        UsageError: the grid is not valid, the folder cannot be made, or nothing tells the sides apart.
        DataError: a side is not what it should be, or the two cannot be compared.
    """
    started = time.monotonic()
    sweeps = [msgspec.structs.replace(sweep, models=absolute_folders(sweep.models, Path.cwd())) for sweep in sweeps]
    keys = dict.fromkeys(server_key(case) for sweep in sweeps for case in sweep.cases())
    _refuse_twins(base, head, [model for model, _ in keys])
    run_name = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{check_name(name if name is not None else 'ab')}"
    with ExitStack() as stack:
        fork_servers = stack.enter_context(ForkServers((base, head), list(keys)))
        told = fork_servers.wait()
        cases = _settled(sweeps, told)
        unsigned = AbManifest(
            schema_version=AB_VERSION,
            created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
            command=["kvbench", *sys.argv[1:]],
            settings=settings,
            base=base,
            head=head,
            introductions={f"{name} {model} t{n}": found for (name, model, n), found in told.items()},
            environment=_environment(cases, told),
            cases=cases,
        )
        manifest = sealed.sealed(unsigned)
        folder, pairs = _make_folder(out, run_name, manifest)
        stack.enter_context(noting(f"what was measured is kept in {folder}"))
        appender = Appender(pairs, manifest.digest)
        stack.push(lambda kind, *_: appender.close(finished=kind is None))
        bench = stack.enter_context(PairMeasurer(fork_servers, cases[0].seed, settings.timeout_s, appender, tell))
        records = conduct(
            cases,
            bench.measure,
            threshold=settings.threshold,
            budget_s=settings.budget_s - (time.monotonic() - started),
            clock=time.monotonic,
            tell=tell,
            get_ready=bench.get_ready,
        )
    return Finished(folder, manifest.title, verdicts.verdicts(records, cases, settings.threshold))


def _settled(sweeps: Sequence[Sweep], told: Told) -> list[Case]:
    """Every case, checked against its model, with the attention that head's code would choose.

    The workers' own processes have told what is needed, so this one imports no torch.
    """
    cases: list[Case] = []
    for case in (case for sweep in sweeps for case in sweep.cases()):
        found = told["head", case.model, case.n_threads]
        refuse_too_long(case, found.max_positions)
        attention = case.attn_implementation or found.attn_implementation
        cases.append(msgspec.structs.replace(case, attn_implementation=attention))
    return list(dict.fromkeys(cases))


def _environment(cases: Sequence[Case], told: Told) -> Environment:
    if any(case.device not in HOST_DEVICES for case in cases):
        return read_environment()
    return read_environment(TorchFacts(isa=next(iter(told.values())).isa, gpu=None, gpu_driver=None))


def _refuse_twins(base: Side, head: Side, models: Sequence[str]) -> None:
    """Two sides of which one is no version of this project, or that can differ in nothing."""
    if base.has_worker != head.has_worker:
        lacking = head if base.has_worker else base
        raise DataError(f"{lacking.name} ({lacking.label}) has no worker protocol (bench/worker.py): not comparable")
    own_code = base.has_worker or any(model.startswith("py:") for model in models)
    if base.tree is not None and not own_code and (base.python, base.variables) == (head.python, head.variables):
        raise UsageError(
            "BASE: this repository is not kvbench's own, so its revisions can differ only in your model: give it as "
            "--model py:module:factory"
        )


def absolute(program: str, here: Path) -> str:
    """An interpreter named by a path, from wherever it runs; links are kept, for they tell a virtual environment."""
    return os.path.abspath(here / program) if os.sep in program else program  # noqa: PTH100  # resolve() follows links


def absolute_folders(models: Sequence[str], here: Path) -> tuple[str, ...]:
    """Checkpoint folders named from wherever their workers run; other models as they are."""
    paths = ((model, here / Path(model).expanduser()) for model in models)
    return tuple(os.path.abspath(path) if model and path.is_dir() else model for model, path in paths)  # noqa: PTH100


def _variable(flag: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UsageError(f"{flag} {text}: give NAME=VALUE, as in ATEN_CPU_CAPABILITY=avx2")
    if name == "PYTHONPATH":
        raise UsageError(f"{flag} {text}: the sides' own folders stand there; set it for both, outside of kvbench")
    return name, value


def _make_folder(out: Path, name: str, manifest: AbManifest) -> tuple[Path, BinaryIO]:
    """The folder of an A/B, and its file of pairs, which is there before the manifest is: without it one is damaged."""
    folder = out / name
    try:
        folder.mkdir(parents=True)
        pairs = (folder / PAIRS).open("xb")
        sealed.write(folder / MANIFEST, manifest)
    except OSError as error:
        raise UsageError(f"--out {folder}: cannot be written ({error.strerror})") from error
    return folder, pairs
