"""Sessions of a baseline on disk: one small sealed file per promoted run, never written again."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec

from bench.case import Case
from bench.errors import DataError
from bench.manifest import Environment
from bench.naming import namer
from bench.record import TokensMatch
from bench.store import sealed
from kvcache.arithmetic.costs import Phase
from kvcache.proof.counters import Counters

BASELINE_VERSION = 1
TIMES = ("latency_ms", "mfu", "mbu")


class CaseFigures(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one case and phase in one session. A figure that was not measured is None, never zero."""

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
    kernels: dict[str, str] | None = None
    """Which kernel computed each product; None for a strategy without a choice, and in older sessions."""
    read_bytes: int | None = None
    """How much that read goes through; None without `mbu`, and in sessions of before it was chosen for the case."""


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """One run, reduced to what later runs are judged by."""

    schema_version: int
    run_id: str
    created_utc: str
    """When the run was measured, ISO 8601."""
    promoted_utc: str
    environment: Environment
    weights: dict[str, str]
    """Digest of each model's weights, by model spec."""
    figures: list[CaseFigures]
    digest: str = ""
    """SHA-256 of this session with an empty digest."""

    def comparable(self, other: Session, case: Case) -> bool:
        """Return whether times of `case` in both come from the same machine, software and weights."""
        same_weights = self.weights.get(case.model) == other.weights.get(case.model)
        return same_weights and self.environment.fingerprint == other.environment.fingerprint

    @property
    def by_case_and_phase(self) -> dict[tuple[str, Phase], CaseFigures]:
        """The figures by `Case.key` and phase."""
        return {(row.case.key, row.phase): row for row in self.figures}


def read_sessions(folder: Path) -> list[Session]:
    """Read every session of a baseline, oldest first, each checked.

    Raises:
        DataError: there is none, or one is damaged or of another schema.
    """
    paths = sorted(folder.glob("*.json"))
    if not paths:
        there = "no session" if folder.is_dir() else "no such folder"
        raise DataError(f"{folder}: {there}; `kvbench baseline promote RUN` makes one")
    sessions = [sealed.read(path, Session, BASELINE_VERSION) for path in paths]
    for path, session in zip(paths, sessions, strict=True):
        refuse_impossible(session, str(path))
    return sorted(sessions, key=lambda session: (session.created_utc, session.run_id))


def refuse_impossible(session: Session, where: str) -> None:
    """Check that every time and every share of a roof is finite and positive: others were never measured.

    Raises:
        DataError: one is not; the message begins with `where`.
    """
    name = namer(row.case for row in session.figures)
    for row in session.figures:
        for figure in TIMES:
            value = getattr(row, figure)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise DataError(
                    f"{where}: {figure} of {name(row.case, row.phase)}, is {value}: no such time was measured"
                )
