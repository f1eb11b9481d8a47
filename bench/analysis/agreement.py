"""Run -> frame: at which positions of the judged text a lossy strategy names the exact run's most likely token."""

import pandas as pd

from bench.analysis.frames import CASE_COLUMNS, case_fields
from bench.record import Run

AGREEMENT_COLUMNS: list[str] = ["case", *CASE_COLUMNS, "machine", "step", "agreement"]


def agreement(run: Run) -> pd.DataFrame:
    """Make one row per lossy case and position: `agreement` is the share of sequences and processes that agree.

    `step` counts the decode steps after the context, from 1.
    """
    fields = case_fields(run)
    rows = [
        {"step": step, "agreement": share, **fields[check.case]}
        for check in run.checks
        if check.quality is not None
        for step, share in enumerate(check.quality.agreement_by_position, start=1)
    ]
    frame = pd.DataFrame(rows, columns=AGREEMENT_COLUMNS)
    return frame.groupby(AGREEMENT_COLUMNS[:-1], sort=False)["agreement"].mean().reset_index()
