"""How a baseline moved over its sessions: sessions -> a frame, a table, a plot. No file access."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bench.judge.gate import EXACT
from bench.store.sessions import Session
from bench.tell.layout import markdown_table
from bench.tell.plots.style import GUIDE, make_figure, styles
from bench.tell.words import NOTHING

DRIFT_COLUMNS = ["session", "created_utc", "machine", "strategy", "phase", "cases", "relative_time", "more_work"]
"""One row per session, strategy and phase: `relative_time` is its time over that of the first session of the same
machine and software (geometric mean over the cases both have), `more_work` the counters above the session before."""


def drift(sessions: Sequence[Session]) -> pd.DataFrame:
    """The sessions, oldest first, as `DRIFT_COLUMNS`. `machine` numbers the fingerprints in order of appearance."""
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


def markdown(frame: pd.DataFrame) -> str:
    """A line per session: times relative to the first session of its machine, a column per strategy and phase."""
    columns = list(dict.fromkeys(zip(frame["phase"], frame["strategy"], strict=True)))
    columns.sort(key=lambda column: column[0], reverse=True)  # prefill first
    headers = ["measured", "machine", *(f"{strategy} {phase}" for phase, strategy in columns), "more work"]
    lines = []
    for _, rows in frame.groupby("session", sort=False):
        times = {(row["phase"], row["strategy"]): row["relative_time"] for row in rows.to_dict("records")}
        more = int(rows["more_work"].sum())
        cells = [f"{times[column]:.3f}" if times.get(column, 0) > 0 else NOTHING for column in columns]
        created = str(rows["created_utc"].iloc[0])[:16].replace("T", " ")
        lines.append([created, str(rows["machine"].iloc[0]), *cells, f"{more} counters" if more else NOTHING])
    align = ["left", "right", *["right"] * len(columns), "right"]
    table = markdown_table(lines, headers, align)
    return f"Times relative to the first session of the same machine and software:\n\n{table}\n"


def figure(frame: pd.DataFrame, name: str) -> Figure:
    """Relative time of each session, prefill and decode side by side; a line breaks where the machine changes."""
    order = {session: place for place, session in enumerate(dict.fromkeys(frame["session"]), start=1)}
    drawn = make_figure("Time of each session, relative to the first of its machine", f"baseline {name}", 4.2)
    looks = styles(frame["strategy"])
    phases = [phase for phase in ("prefill", "decode") if (frame["phase"] == phase).any()]
    for place, phase in enumerate(phases, start=1):
        axes = drawn.add_subplot(1, len(phases), place, sharey=drawn.axes[0] if drawn.axes else None)
        rows = frame[frame["phase"] == phase]
        for (strategy, machine), group in rows.groupby(["strategy", "machine"], sort=False):
            label = str(strategy) if machine == rows["machine"].iloc[0] else None
            axes.plot(group["session"].map(order), group["relative_time"], label=label, **looks[str(strategy)].curve)
        for session in rows.loc[rows["more_work"] > 0, "session"].unique():
            axes.axvline(order[session], color=GUIDE, linewidth=0.8, linestyle=":")
        axes.axhline(1, color=GUIDE, linewidth=0.8)
        axes.set_title(phase, fontsize=10)
        axes.set_xlabel("session, oldest first (dotted: a counter grew)", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("time / time of the first session" if place == 1 else "")
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, 0.9), max(high, 1.1))
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = drawn.axes[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, handlelength=3.5)
    return drawn


def _grown(before: Session, session: Session, key: str, phase: Any) -> int:
    past, now = (found.by_case_and_phase.get((key, phase)) for found in (before, session))
    if past is None or now is None or past.counters.steps != now.counters.steps:
        return 0
    return sum(getattr(now.counters, name) > getattr(past.counters, name) for name in EXACT)
