"""Baselines: one small file per promoted session, never written again. `promote` is the only way to make one."""

import hashlib
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pandas as pd

from bench.analysis import frames
from bench.analysis.cautions import disturbed
from bench.analysis.summary import summarize
from bench.analysis.tidy import Tidy
from bench.case import Case
from bench.errors import DataError, FailedRun, UsageError
from bench.manifest import Environment
from bench.naming import Name, namer
from bench.record import FAULTS, Run, kernels_of
from bench.store import sealed
from bench.store.run_folder import check_name, writing
from bench.store.sessions import BASELINE_VERSION, CaseFigures, Session, read_sessions, refuse_impossible
from kvcache.arithmetic.costs import Phase
from kvcache.proof.counters import Counters


def session_of(tidy: Tidy) -> Session:
    """Boil a run down. Cases that did not end well, or are unsupported here, are left out.

    Raises:
        DataError: the counters of a case differ between its processes, or several machines measured the run.
    """
    run, ended = tidy.run, tidy.outcomes
    if len(run.environments) > 1:
        raise DataError(f"{run.path}: was measured on several machines ({run.machine_names}); a session is of one")
    rows = {(row["case"], row["phase"]): row for row in frames.records(summarize(tidy))}
    name = namer(plan.case for plan in run.manifest.plan)
    figures = []
    for case in (plan.case for plan in run.manifest.plan if ended[plan.case.key].status == "ok"):
        match = ended[case.key].tokens_match
        if match is None:
            raise DataError(f"{run.path}: {name(case)} was timed, but its tokens were never checked: measure it again")
        for phase, counters in _counters(run, case, name).items():
            row = rows[case.key, phase]
            figures.append(
                CaseFigures(
                    case=case,
                    phase=phase,
                    tokens_match=match,
                    counters=counters,
                    samples=int(row["samples"]),
                    latency_ms=float(row["latency_ms"]),
                    mfu=_share(row["mfu"]),
                    mbu=_share(row["mbu"]),
                    kernels=kernels_of(check for check in run.checks if check.case == case.key) or None,
                    read_bytes=None if pd.isna(row["read_bytes"]) else int(row["read_bytes"]),
                )
            )
    session = Session(
        schema_version=BASELINE_VERSION,
        run_id=run.manifest.run_id,
        created_utc=run.manifest.created_utc,
        promoted_utc=datetime.now(UTC).isoformat(timespec="microseconds"),
        environment=run.environments[0],
        weights=run.manifest.weights,
        figures=figures,
    )
    refuse_impossible(session, run.path)
    return session


def promote(run: Run, baselines: Path, name: str | None) -> Path:
    """Add `run` as a session to `baselines/<name>` (by default named after the machine); return the new file.

    Raises:
        FailedRun: a case failed or emitted other tokens.
        DataError: the run is unfinished or was disturbed, cannot be a session, or lacks a case that the newest session
            there has.
        UsageError: it is a session there already, or the folder cannot be written.
    """
    tidy = Tidy.of(run)
    refuse_unfit(tidy)
    labels = _labels(run)
    for key, share in disturbed(tidy).items():
        raise DataError(
            f"{run.name} cannot be a baseline: {share:.0%} of the rounds of {labels[key]} were disturbed; measure "
            "again when the machine is quieter, or with more --repetitions"
        )
    folder = baselines / (name if name is not None else machine_name(run.environments[0]))
    path = folder / f"{run.manifest.run_id}.json"
    with writing(f"--baseline-dir {baselines}"):  # asking for a file may be refused, too
        known = read_sessions(folder) if folder.is_dir() and any(folder.glob("*.json")) else []
        is_known = path.exists()
    session = session_of(tidy)  # its time comes after those that were read, also where others promote meanwhile
    before = newest(known).by_case_and_phase if known else {}
    name_of = namer(row.case for row in (*before.values(), *session.figures))
    for lost in sorted(before.keys() - session.by_case_and_phase.keys()):
        lost_name = name_of(before[lost].case, before[lost].phase)
        raise DataError(f"{run.name} lacks {lost_name}, which {folder} has: promote it under another --name")
    if is_known:
        raise UsageError(f"{run.name}: is a session of {folder} already")
    latest = max((one.promoted_utc for one in known), default="")
    if latest > session.promoted_utc:  # a session is the newest by its time
        raise UsageError(
            f"{run.name}: the clock says {session.promoted_utc}, before {latest}, when the newest session of {folder} "
            "was accepted: set the clock"
        )
    with writing(f"--baseline-dir {baselines}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        sealed.write(path, session)
    return path


def refuse_unfit(tidy: Tidy) -> None:
    """Refuse a run that others cannot be judged by.

    Raises:
        FailedRun: a case failed or emitted other tokens, or none is supported.
        DataError: a case was not measured, or lacks rounds, or other kernels computed it in another process.
    """
    run, ended, labels = tidy.run, tidy.outcomes, _labels(tidy.run)
    refusal = f"{run.name} cannot be a baseline"
    failed = [key for key, end in ended.items() if end.status in FAULTS]
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise FailedRun(f"{refusal}: {labels[failed[0]]}: {ended[failed[0]].status}: {ended[failed[0]].error}{more}")
    for key, end in ended.items():
        if not end.measured:
            raise DataError(f"{refusal}: {labels[key]}: not measured: {end.error}")
    for key in tidy.unfinished:
        raise DataError(f"{refusal}: {labels[key]} lacks rounds; `kvbench run --resume {run.path}` adds them")
    for key in ended:
        for product, kernels in kernels_of(check for check in run.checks if check.case == key).items():
            if ", " in kernels:
                raise DataError(
                    f"{refusal}: {labels[key]}: {product} was computed by {kernels} in its processes; measure it again "
                    "with --kernels"
                )
    if all(end.status == "unsupported" for end in ended.values()):
        raise FailedRun(f"{refusal}: every case of it is unsupported")


def _labels(run: Run) -> dict[str, str]:
    """Name each planned case, by its key."""
    cases = [plan.case for plan in run.manifest.plan]
    name = namer(cases)
    return {case.key: name(case) for case in cases}


def find_baseline(baselines: Path, name: str | None) -> Path:
    """Find the folder of the baseline `name`, or of the only one there is.

    Raises:
        UsageError: the name is no name, or is left out where there are several.
        DataError: there is no such baseline.
    """
    known = sorted(path.name for path in baselines.glob("*/") if any(path.glob("*.json")))
    if name is None and len(known) > 1:
        raise UsageError(f"--name: which baseline? There are {', '.join(known)}")
    folder = baselines / (check_name(name) if name is not None else "".join(known))
    if folder.name not in known:
        there = f"there are {', '.join(known)}" if known else "there is none yet: `kvbench baseline promote RUN`"
        raise DataError(f"{folder}: no baseline; {there}")
    return folder


def newest(sessions: Sequence[Session]) -> Session:
    """Return the session that sets cases and counters: the one accepted last, whenever it was measured."""
    return max(sessions, key=lambda session: (session.promoted_utc, session.run_id))


def machine_name(environment: Environment) -> str:
    """Name the folder for sessions of one fingerprint: readable, and different for different ones."""
    kind = environment.gpu or environment.cpu_model
    slug = re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")
    fingerprint = hashlib.sha256(msgspec.json.encode(environment.fingerprint, order="sorted")).hexdigest()
    return f"{slug}-{environment.cores}-cores-{fingerprint[:8]}"


def _counters(run: Run, case: Case, name: Name) -> dict[Phase, Counters]:
    found = [check.counters for check in run.checks if check.case == case.key]
    # A resumed run checks a case again, in a process that has compiled something else before: the fewest graphs count.
    compiled = ("compiled_graphs", "recompilations")
    fewest = {
        phase: {name: min(getattr(counters[phase], name) for counters in found) for name in compiled}
        for phase in found[0]
    }
    settled = [
        {phase: msgspec.structs.replace(counters[phase], **values) for phase, values in fewest.items()}
        for counters in found
    ]
    if any(counters != settled[0] for counters in settled):
        raise DataError(f"{run.path}: {name(case)}: its counters differ between processes: it is not deterministic")
    return settled[0]


def _share(value: Any) -> float | None:
    return None if pd.isna(value) else float(value)
