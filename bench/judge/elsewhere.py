"""What of a run can stand beside an import: another tool times a prefill or a generation, not one after the other."""

import msgspec
import pandas as pd

from bench.analysis.summary import phases
from bench.case import Case
from bench.record import Run
from kvcache.arithmetic.costs import Phase

SHORT = 0.25
"""A generation of at most so many times the tokens before it has the length of any other such one: the tokens that its
steps attend to on average differ by at most half as much, an eighth."""


def timed_phases(run: Run, case: Case) -> list[Phase]:
    """List the phases of which a run has a time of its own: an imported generation has no prefill beside it."""
    return ["decode"] if run.manifest.origin is not None and case.n_gen > 1 else phases(case)


def of_timed_phases(run: Run, rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of a frame, by its columns `case` and `phase`, that have a time of their own."""
    if run.manifest.origin is None:
        return rows
    timed = {(plan.case.key, phase) for plan in run.manifest.plan for phase in timed_phases(run, plan.case)}
    return rows[[pair in timed for pair in zip(rows["case"], rows["phase"], strict=True)]]


def work(case: Case, phase: Phase) -> Case:
    """Reduce a case to what a phase of it does, equal for cases whose times of that phase can be ranked.

    A prefill takes its time whatever is generated after it. Decoding is known by the tokens before it and by their
    number, which a short generation leaves open (`SHORT`). Whether those tokens came as a prompt or as a depth does not
    matter; a prompt of one token is itself a step like the others.
    """
    if phase == "prefill":
        return msgspec.structs.replace(case, n_gen=0)
    is_step = case.n_prompt == 1
    before, n_steps = case.n_depth + (0 if is_step else case.n_prompt), case.n_gen - (0 if is_step else 1)
    return msgspec.structs.replace(case, n_prompt=0, n_depth=before, n_gen=n_steps if n_steps > SHORT * before else 0)
