"""Sets two runs side by side: the ratio of their times per case and phase, and what cannot be compared, and why."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import pandas as pd

from bench.analysis import estimators
from bench.analysis.estimators import Ratio
from bench.analysis.frames import CASE_COLUMNS
from bench.analysis.tidy import NOT_MEASURED, Outcome, Tidy, independent_values
from bench.case import Case
from bench.record import Run

Difference = Literal["faster", "slower", "no difference shown", "too few rounds"]

ROW_FLOATS: list[str] = ["a_ms", "a_low", "a_high", "b_ms", "b_low", "b_high", "ratio", "ratio_low", "ratio_high"]
ROW_COLUMNS: list[str] = [*CASE_COLUMNS, "phase", *ROW_FLOATS, "interval", "verdict"]

EXIT_NOT_COMPARABLE = 3


class Excluded(msgspec.Struct, frozen=True, kw_only=True):
    """A case (by its key) that was not compared, and why."""

    case: str
    reason: str


class Comparison(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """The times of run B beside those of run A."""

    a: str
    b: str
    """Names of the runs."""
    rows: pd.DataFrame
    """One row per compared case and phase, columns `ROW_COLUMNS`: medians in ms and their intervals; `ratio` = B / A
    (below one B is faster) and its 95 % interval; `interval` is "unpaired"; `verdict` is the `Difference` of B."""
    only_in_a: list[Excluded]
    only_in_b: list[Excluded]
    not_comparable: list[Excluded]
    """In both, but with a valid time on one side only, or of other weights."""
    in_neither: list[Excluded]
    """In both, and without a valid time on either side."""
    differences: list[str]
    """Environment and weights that differ, as `field: a -> b`."""
    same_machine: bool
    """Whether what decides times (`Environment.fingerprint`) is equal."""
    fields_apart: list[str] = []
    """Fields of a case of which the runs have no value in common, as `model: A has x, B has y`."""

    @property
    def exit_code(self) -> int:
        """3 if nothing could be compared, or a case has a time on one side only; else 0, whatever the ratios are."""
        return EXIT_NOT_COMPARABLE if self.rows.empty or self.one_sided else 0

    @property
    def one_sided(self) -> list[Excluded]:
        """The cases that have a valid time on one side only."""
        return [*self.only_in_a, *self.only_in_b, *self.not_comparable]


def compare(a: Run, b: Run) -> Comparison:
    """Set run `b` beside run `a`, case by case. Cases pair if they are equal in every field, the seed included.

    Two runs are two sessions, so their rounds are no pairs: the ratio includes whatever the machine did in between, and
    its interval covers only what varies within them. `kvbench ab` measures in pairs.
    """
    tidy_a, tidy_b = Tidy.of(a), Tidy.of(b)
    ended_a, ended_b = tidy_a.outcomes, tidy_b.outcomes
    cases_a, cases_b = _cases(a, ended_a), _cases(b, ended_b)
    other_weights = {model for model, digest in a.manifest.weights.items() if b.manifest.weights.get(model) != digest}
    not_comparable: list[Excluded] = []
    in_neither: list[Excluded] = []
    rows: list[dict[str, Any]] = []
    turns_a, turns_b = tidy_a.turns, tidy_b.turns
    for key in (key for key in cases_a if key in cases_b):
        case, failed = cases_a[key], {"A": ended_a[key], "B": ended_b[key]}
        failed = {side: ended for side, ended in failed.items() if ended.status != "ok"}
        if failed:
            reason = "; ".join(f"{ended.status} in {side}: {ended.error}" for side, ended in failed.items())
            (in_neither if len(failed) == 2 else not_comparable).append(Excluded(case=key, reason=reason))
        elif case.model in other_weights:
            not_comparable.append(Excluded(case=key, reason=f"the weights of {case.model} differ"))
        else:
            rows += _rows(case, turns_a[turns_a["case"] == key], turns_b[turns_b["case"] == key])
    environment_a, environment_b = a.manifest.environment, b.manifest.environment
    return Comparison(
        a=a.name,
        b=b.name,
        rows=pd.DataFrame(rows, columns=ROW_COLUMNS).astype(dict.fromkeys(ROW_FLOATS, "float64")),
        only_in_a=_only_in(cases_a, cases_b, ended_b, other="B"),
        only_in_b=_only_in(cases_b, cases_a, ended_a, other="A"),
        not_comparable=not_comparable,
        in_neither=in_neither,
        differences=_differences(a, b),
        same_machine=environment_a.fingerprint == environment_b.fingerprint,
        fields_apart=_fields_apart(cases_a, cases_b),
    )


def difference(ratio: Ratio) -> Difference:
    """Name what a ratio B / A of times shows, by whether its interval lies below one, above it, or on both sides."""
    if ratio.low is None or ratio.high is None:
        return "too few rounds"
    if ratio.high < 1:
        return "faster"
    return "slower" if ratio.low > 1 else "no difference shown"


def _cases(run: Run, ended: dict[str, Outcome]) -> dict[str, Case]:
    """List the cases that a run has a result of, by key."""
    return {plan.case.key: plan.case for plan in run.manifest.plan if ended[plan.case.key].measured}


def _only_in(own: dict[str, Case], others: dict[str, Case], ended: dict[str, Outcome], other: str) -> list[Excluded]:
    unpaired = [case for key, case in others.items() if key not in own]

    def reason(key: str, case: Case) -> str:
        if key not in ended:
            return f"not in {other}{nearest(case, unpaired)}"
        why = ended[key].error
        return f"{other} ended before it" if why == NOT_MEASURED else f"not measured in {other}: {why}"

    return [Excluded(case=key, reason=reason(key, case)) for key, case in own.items() if key not in others]


def nearest(case: Case, unpaired: list[Case]) -> str:
    """Name the other run's case that differs in one field alone, if there is one: it is probably what was meant."""
    fields = msgspec.structs.asdict(case)
    for candidate in unpaired:
        found = msgspec.structs.asdict(candidate)
        differing = [name for name in fields if fields[name] != found[name]]
        if len(differing) == 1 and differing[0] != "strategy":
            return f", which has it with {differing[0]} = {found[differing[0]]}"
    return ""


def _fields_apart(cases_a: dict[str, Case], cases_b: dict[str, Case]) -> list[str]:
    """List the fields that keep every case of the one run from being a case of the other."""
    lines: list[str] = []
    for name in Case.__struct_fields__ if cases_a and cases_b else ():
        values_a, values_b = (
            dict.fromkeys(str(getattr(case, name)) for case in cases.values()) for cases in (cases_a, cases_b)
        )
        if values_a.keys().isdisjoint(values_b):
            lines.append(f"{name}: A has {', '.join(values_a)}, B has {', '.join(values_b)}")
    return lines


def _rows(case: Case, a: pd.DataFrame, b: pd.DataFrame) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for phase in a["phase"].unique():
        values_a = independent_values(a[a["phase"] == phase])
        values_b = independent_values(b[b["phase"] == phase])
        ratio = estimators.unpaired_ratio(values_b, values_a)
        times = [*estimators.median_interval(values_a), *estimators.median_interval(values_b)]
        figures = dict(zip(ROW_FLOATS, [*times, ratio.estimate, ratio.low, ratio.high], strict=True))
        found = {"phase": phase, "interval": "unpaired", "verdict": difference(ratio)}
        rows.append({**msgspec.structs.asdict(case), **figures, **found})
    return rows


def _differences(a: Run, b: Run) -> list[str]:
    """List the fields of the environments, and the weights, that differ; the load of the moment always does."""
    fields_a, fields_b = (msgspec.structs.asdict(run.manifest.environment) for run in (a, b))
    weights_a, weights_b = a.manifest.weights, b.manifest.weights
    lines = [
        f"{name}: {fields_a[name]} -> {fields_b[name]}"
        for name in fields_a
        if name != "load_1min" and fields_a[name] != fields_b[name]
    ]
    lines += [
        f"weights of {model}: {weights_a[model]} -> {weights_b[model]}"
        for model in weights_a
        if model in weights_b and weights_a[model] != weights_b[model]
    ]
    return lines
