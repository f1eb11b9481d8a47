"""Everything that is derived from a stored run, written beside its samples: tables, plots. Never read back."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from bench import plots, tables
from bench.frame import steps
from bench.record import Run
from bench.store import write_atomically
from bench.summary import summarize


def write_report(run: Run) -> pd.DataFrame:
    """Draw every table and plot of `run` into its folder; return the summary (one row per case and phase)."""
    folder = Path(run.path)
    summary = summarize(run)
    for suffix in ("csv", "json", "md"):
        write_atomically(folder / f"summary.{suffix}", tables.render(summary, suffix).encode())
    return summary
