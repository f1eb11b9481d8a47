"""Baselines: one small file per promoted session, never written again. `promote` is the only way to make one."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from bench.analysis.cautions import disturbed
from bench.analysis.outcomes import outcomes, unfinished
from bench.analysis.summary import phases, summarize
from bench.case import Case
from bench.errors import DataError, FailedRun, UsageError
from bench.record import Environment, Run, TokensMatch
from bench.store.run_folder import check_name, write_atomically
from bench.tell.words import missing
from kvcache.arithmetic.costs import Phase
from kvcache.proof.counters import Counters

BASELINE_VERSION = 1
TIMES = ("latency_ms", "mfu", "mbu")


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What a session says of one case and phase. A figure that was not measured is None, never zero."""

    case: Case
    phase: Phase
    tokens_match: TokensMatch
    counters: Counters
    samples: int
    """Timed turns behind the medians."""
    latency_ms: float
    mfu: float | None
    mbu: float | None
    """Shares of the GEMM rate and of the read bandwidth that were measured beside it."""


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """One run, boiled down to what later runs are judged by."""

    schema_version: int
    run_id: str
    created_utc: str
    """When the run was measured, ISO 8601."""
    promoted_utc: str
    environment: Environment
    weights: dict[str, str]
    """Digest of each model's weights, by model spec."""
    figures: list[Figures]
    digest: str = ""
    """SHA-256 of this session with an empty digest."""

    def comparable(self, other: Session, case: Case) -> bool:
        """Whether times of `case` in both come from the same machine, software and weights."""
        same_weights = self.weights.get(case.model) == other.weights.get(case.model)
        return same_weights and self.environment.fingerprint == other.environment.fingerprint

    @property
    def by_case_and_phase(self) -> dict[tuple[str, Phase], Figures]:
        """The figures by `Case.key` and phase."""
        return {(row.case.key, row.phase): row for row in self.figures}


def session_of(run: Run) -> Session:
    """Boil `run` down. Cases that did not end well, or are unsupported here, are left out.

    Raises:
        DataError: a case has no counters (an older kvbench stored it), or they differ between its processes.
    """
    ended = outcomes(run)
    rows = _summary_rows(run)
    figures = []
    for case in (plan.case for plan in run.manifest.plan if ended[plan.case.key].status == "ok"):
        match = ended[case.key].tokens_match
        if match is None:
            raise DataError(f"{run.path}: {case.key} was timed, but its tokens were never checked: measure it again")
        for phase, counters in _counters(run, case).items():
            row = rows[case.key, phase]
            figures.append(
                Figures(
                    case=case,
                    phase=phase,
                    tokens_match=match,
                    counters=counters,
                    samples=int(row["samples"]),
                    latency_ms=float(row["latency_ms"]),
                    mfu=_share(row["mfu"]),
                    mbu=_share(row["mbu"]),
                )
            )
    session = Session(
        schema_version=BASELINE_VERSION,
        run_id=run.manifest.run_id,
        created_utc=run.manifest.created_utc,
        promoted_utc=datetime.now(UTC).isoformat(timespec="microseconds"),
        environment=run.manifest.environment,
        weights=run.manifest.weights,
        figures=figures,
    )
    _refuse_impossible(session, run.path)
    return session


def promote(run: Run, baselines: Path, name: str | None) -> Path:
    """Add `run` as a session to `baselines/<name>` (by default named after the machine); return the new file.

    Raises:
        FailedRun: a case failed, emitted other tokens, or was not measured.
        DataError: the run was disturbed, cannot be a session, or lacks a case that the newest session there has.
        UsageError: it is a session there already, or the folder cannot be written.
    """
    refuse_unfit(run)
    for key, share in disturbed(run).items():
        raise DataError(
            f"{run.name} cannot be a baseline: {share:.0%} of the rounds of {key} were disturbed; measure again when "
            "the machine is quieter, or with more --repetitions"
        )
    session = session_of(run)
    folder = baselines / (name if name is not None else machine_name(session.environment))
    known = read_sessions(folder) if folder.is_dir() and any(folder.glob("*.json")) else []
    lost = newest(known).by_case_and_phase.keys() - session.by_case_and_phase.keys() if known else set()
    for key, _ in sorted(lost):
        raise DataError(f"{run.name} lacks {key}, which {folder} has: promote it under another --name")
    path = folder / f"{session.run_id}.json"
    if path.exists():
        raise UsageError(f"{run.name}: is a session of {folder} already")
    session = msgspec.structs.replace(session, digest=_digest(session))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, msgspec.json.format(msgspec.json.encode(session), indent=1) + b"\n")
    except OSError as error:
        raise UsageError(f"--baseline-dir {baselines}: cannot be written ({error.strerror})") from error
    return path


def refuse_unfit(run: Run) -> None:
    """See to it that nothing failed and nothing is missing in a run that others are judged by.

    Raises:
        FailedRun: a case failed, emitted other tokens, or was not measured, or none is supported.
    """
    ended = outcomes(run)
    bad = {key: end for key, end in ended.items() if end.status not in {"ok", "unsupported"}}
    for key, end in bad.items():
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise FailedRun(f"{run.name} cannot be a baseline: {key}: {end.status}: {end.error}{more}")
    for key in unfinished(run):
        raise FailedRun(
            f"{run.name} cannot be a baseline: {key} lacks rounds; `kvbench run --resume {run.name}` adds them"
        )
    if all(end.status == "unsupported" for end in ended.values()):
        raise FailedRun(f"{run.name} cannot be a baseline: every case of it is unsupported")


def find_baseline(baselines: Path, name: str | None) -> Path:
    """The folder of the baseline `name`, or of the only one there is.

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


def read_sessions(folder: Path) -> list[Session]:
    """Every session of a baseline, oldest first, each checked.

    Raises:
        DataError: there is none, or one is damaged or of a newer schema.
    """
    paths = sorted(folder.glob("*.json"))
    if not paths:
        there = "no session" if folder.is_dir() else "no such folder"
        raise DataError(f"{folder}: {there}; `kvbench baseline promote RUN` makes one")
    return sorted(map(_read_session, paths), key=lambda session: (session.created_utc, session.run_id))


def newest(sessions: Sequence[Session]) -> Session:
    """The session that sets cases and counters: the one accepted last, whenever it was measured."""
    return max(sessions, key=lambda session: (session.promoted_utc or session.created_utc, session.run_id))


def machine_name(environment: Environment) -> str:
    """A folder name for sessions of one fingerprint: readable, and different for different ones."""
    kind = environment.gpu or environment.cpu_model
    slug = re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")
    fingerprint = hashlib.sha256(msgspec.json.encode(environment.fingerprint, order="sorted")).hexdigest()
    return f"{slug}-{environment.cores}-cores-{fingerprint[:8]}"


def _summary_rows(run: Run) -> dict[tuple[str, Phase], dict[Any, Any]]:
    """The summary's rows by case key and phase; it has them in the order of the plan."""
    keys = [(plan.case.key, phase) for plan in run.manifest.plan for phase in phases(plan.case)]
    return dict(zip(keys, summarize(run).to_dict("records"), strict=True))


def _counters(run: Run, case: Case) -> dict[Phase, Counters]:
    found = [check.counters for check in run.checks if check.case == case.key]
    first = found[0] if found else None
    if first is None:
        raise DataError(f"{run.path}: {case.key} has no counters; it was stored by an older kvbench: measure it again")
    # A resumed run checks a case again, in a process that has compiled something else before: the fewest graphs count.
    compiled = ("compiled_graphs", "recompilations")
    fewest = {
        phase: {name: min(getattr(counters[phase], name) for counters in found if counters) for name in compiled}
        for phase in first
    }
    settled = [
        {phase: msgspec.structs.replace(counters[phase], **fewest[phase]) for phase in first}
        for counters in found
        if counters is not None
    ]
    if any(counters != settled[0] for counters in settled):
        raise DataError(f"{run.path}: the counters of {case.key} differ between its processes: it is not deterministic")
    return settled[0]


def _share(value: Any) -> float | None:
    return None if missing(value) else float(value)


def _read_session(path: Path) -> Session:
    try:
        content = path.read_bytes()
        version = msgspec.json.decode(content, type=dict[str, object]).get("schema_version")
        if isinstance(version, int) and version > BASELINE_VERSION:
            raise DataError(
                f"{path}: schema {version} is newer than this kvbench reads ({BASELINE_VERSION}); upgrade it"
            )
        session = msgspec.json.decode(content, type=Session)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: damaged ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    if session.digest != _digest(session):
        raise DataError(f"{path}: damaged (its digest does not fit its content)")
    _refuse_impossible(session, str(path))
    return session


def _refuse_impossible(session: Session, where: str) -> None:
    """A time, or a share of a roof, that is not finite and positive was never measured."""
    for row in session.figures:
        for name in TIMES:
            value = getattr(row, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise DataError(
                    f"{where}: {name} of {row.case.key}, {row.phase}, is {value}: no such time was measured"
                )


def _digest(session: Session) -> str:
    return hashlib.sha256(msgspec.json.encode(msgspec.structs.replace(session, digest=""))).hexdigest()
