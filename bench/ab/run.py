"""`kvbench ab`: a verdict between two revisions or two environments, measured interleaved in one go, and stored."""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from bench.ab import sides
from bench.ab.conduct import conduct
from bench.ab.pairs import ForkServers, Introductions, PairMeasurer, server_key
from bench.ab.record import AB_VERSION, MANIFEST, PAIRS, AbManifest, Settings, Side
from bench.case import Case, Sweep
from bench.machine.environment import TorchFacts, read_environment
from bench.machine.places import current_folder
from bench.manifest import Environment
from bench.measure.plan import refuse_too_long
from bench.measure.run import noting
from bench.naming import namer
from bench.store import sealed
from bench.store.checked_lines import Appender
from bench.store.run_folder import check_name, make_folder, writing


def compare(
    base: Side,
    head: Side,
    sweeps: Sequence[Sweep],
    settings: Settings,
    out: Path,
    name: str | None,
    say: Callable[[str], None],
    kernels: dict[str, str] | None = None,
) -> Path:
    """Measure until every quantity is decided or the budget is spent; return the folder in which the A/B is stored.

    Both sides compute by the same `kernels`, or by those that head's code finds to be the fastest.

    Raises:
        UsageError: the grid is not valid, the folder cannot be made, or the sides are the same.
        DataError: a side is not what it should be, or the two cannot be compared.
    """
    started = time.monotonic()
    here = current_folder()
    sweeps = [msgspec.structs.replace(sweep, models=sides.absolute_folders(sweep.models, here)) for sweep in sweeps]
    keys = dict.fromkeys(server_key(case) for sweep in sweeps for case in sweep.cases())
    sides.refuse_twins(base, head, [model for model, _ in keys])
    run_name = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{check_name(name if name is not None else 'ab')}"
    with ExitStack() as stack:
        fork_servers = stack.enter_context(ForkServers((base, head), list(keys)))
        introductions = fork_servers.wait()
        cases = _settled(sweeps, introductions)
        manifest = AbManifest(
            schema_version=AB_VERSION,
            created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
            command=["kvbench", *sys.argv[1:]],
            settings=settings,
            base=base,
            head=head,
            introductions={f"{name} {model} t{n}": found for (name, model, n), found in introductions.items()},
            environment=_environment(cases, introductions),
            cases=cases,
        )
        folder, appender = _make_folder(out, run_name, manifest)
        stack.enter_context(noting(f"what was measured is kept in {folder}"))
        stack.enter_context(appender)
        bench = stack.enter_context(
            PairMeasurer(fork_servers, cases[0].seed, settings.timeout_s, appender, say, namer(cases), kernels)
        )
        conduct(
            cases,
            bench.measure,
            threshold=settings.threshold,
            cores=manifest.environment.cores,
            budget_s=settings.budget_s - (time.monotonic() - started),
            clock=time.monotonic,
            say=say,
            get_ready=bench.get_ready,
        )
    return folder


def _settled(sweeps: Sequence[Sweep], introductions: Introductions) -> list[Case]:
    """List every case, checked against its model, with the attention that head's code would choose.

    The fork servers' introductions hold what is needed, so this process imports no torch.
    """
    cases: list[Case] = []
    for case in (case for sweep in sweeps for case in sweep.cases()):
        found = introductions["head", case.model, case.n_threads]
        refuse_too_long(case, found.max_positions)
        attention = case.attn_implementation or found.attn_implementation
        cases.append(msgspec.structs.replace(case, attn_implementation=attention))
    return list(dict.fromkeys(cases))


def _environment(cases: Sequence[Case], introductions: Introductions) -> Environment:
    if not all(case.on_host for case in cases):
        return read_environment()
    return read_environment(TorchFacts(isa=next(iter(introductions.values())).isa, gpu=None, gpu_driver=None))


def _make_folder(out: Path, name: str, manifest: AbManifest) -> tuple[Path, Appender]:
    """Make the folder of an A/B and its file of pairs, before the manifest: without it an A/B is damaged."""
    folder = make_folder(out, name)
    with writing(f"--out {folder}"):
        pairs = (folder / PAIRS).open("xb")
        return folder, Appender(pairs, sealed.write(folder / MANIFEST, manifest).digest)
