"""Run -> frame: at which positions of the judged text a lossy strategy names the exact run's most likely token."""

import msgspec
import pandas as pd

from bench.analysis.frames import CASE_COLUMNS
from bench.record import Run

AGREEMENT_COLUMNS: list[str] = ["case", *CASE_COLUMNS, "machine", "step", "agreement"]


def agreement(run: Run) -> pd.DataFrame:
    """Make one row per lossy case and position: `agreement` is the share of sequences and processes that agree.

    `step` counts the decode steps after the context, from 1.
    """
    cases = [plan.case for plan in run.manifest.plan]
    fields = {
        case.key: {"case": case.key, **msgspec.structs.asdict(case), "machine": run.environment(case).hostname}
        for case in cases
    }
    rows = [
        {"step": step, "agreement": share, **fields[check.case]}
        for check in run.checks
        if check.quality is not None
        for step, share in enumerate(check.quality.agreement_by_position, start=1)
    ]
    frame = pd.DataFrame(rows, columns=AGREEMENT_COLUMNS)
    return frame.groupby(AGREEMENT_COLUMNS[:-1], sort=False)["agreement"].mean().reset_index()
