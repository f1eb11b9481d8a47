"""How the times and counters of a baseline moved over its sessions: sessions -> a frame."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from bench.judge.gate import EXACT
from bench.store.sessions import Session

DRIFT_COLUMNS = ["session", "created_utc", "machine", "strategy", "phase", "cases", "relative_time", "more_work"]
"""One row per session, strategy and phase: `relative_time` is its time over that of the first session of the same
machine and software (geometric mean over the cases both have), `more_work` the counters above the session before."""


def drift(sessions: Sequence[Session]) -> pd.DataFrame:
    """Tabulate the sessions, oldest first, as `DRIFT_COLUMNS`; `machine` numbers the fingerprints as they appear."""
    machines: list[Session] = []
    rows: list[dict[str, Any]] = []
    for number, session in enumerate(sessions):
        fingerprint = session.environment.fingerprint
        first = next((past for past in machines if past.environment.fingerprint == fingerprint), session)
        machines += [session] if first is session else []
        before = sessions[max(0, number - 1)]
        kinds = dict.fromkeys((row.case.strategy, row.phase) for row in session.figures)
        for strategy, phase in kinds:
            own = [row for row in session.figures if (row.case.strategy, row.phase) == (strategy, phase)]
            pairs = [(row, first.by_case_and_phase.get((row.case.key, phase))) for row in own]
            logs = [np.log(row.latency_ms / past.latency_ms) for row, past in pairs if past is not None]
            rows.append(
                {
                    "session": session.run_id,
                    "created_utc": session.created_utc,
                    "machine": machines.index(first) + 1,
                    "strategy": strategy,
                    "phase": phase,
                    "cases": len(own),
                    "relative_time": float(np.exp(np.mean(logs))) if logs else float("nan"),
                    "more_work": sum(_grown(before, session, row.case.key, phase) for row in own),
                }
            )
    return pd.DataFrame(rows, columns=DRIFT_COLUMNS)


def _grown(before: Session, session: Session, key: str, phase: Any) -> int:
    past, now = (found.by_case_and_phase.get((key, phase)) for found in (before, session))
    if past is None or now is None or past.counters.steps != now.counters.steps:
        return 0
    return sum(getattr(now.counters, name) > getattr(past.counters, name) for name in EXACT)
