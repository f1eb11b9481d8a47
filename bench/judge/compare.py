"""Sets two runs side by side: the ratio of their times per case and phase, and what cannot be compared, and why."""

from typing import Any, Literal

import msgspec
import pandas as pd

from bench.analysis import estimators
from bench.analysis.estimators import Ratio
from bench.analysis.frames import CASE_COLUMNS
from bench.analysis.tidy import NOT_MEASURED, Tidy, independent_values, timed_phases
from bench.case import Case
from bench.manifest import ELSEWHERE
from bench.record import Run, kernels_of
from kvcache.arithmetic.costs import Phase

Difference = Literal["faster", "slower", "no difference shown", "too few rounds", "measured elsewhere"]

ROW_FLOATS: list[str] = ["a_ms", "a_low", "a_high", "b_ms", "b_low", "b_high", "ratio", "ratio_low", "ratio_high"]
ROW_COLUMNS: list[str] = [*CASE_COLUMNS, "phase", *ROW_FLOATS, "interval", "verdict"]

EXIT_NOT_COMPARABLE = 3

DEFAULT = "default"
"""Stands for a setting of another tool that a run does not name."""


class Excluded(msgspec.Struct, frozen=True, kw_only=True):
    """A case that was not compared, and why."""

    case: Case
    reason: str


class Comparison(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """The times of run B beside those of run A."""

    a: str
    b: str
    """Names of the runs."""
    labels: tuple[str, str]
    """The same, marked where another tool measured the run (`Run.label`)."""
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


def compare(tidy_a: Tidy, tidy_b: Tidy) -> Comparison:
    """Set run B beside run A, case by case. Cases pair if they are equal in every field, the seed included.

    Two runs are two sessions, so their rounds are no pairs: the ratio includes whatever the machine did in between, and
    its interval covers only what varies within them. `kvbench ab` measures in pairs. Both may be lean (`Tidy.lean`).
    """
    a, b = tidy_a.run, tidy_b.run
    cases_a, cases_b = measured_cases(tidy_a), measured_cases(tidy_b)
    other_weights = {model for model, digest in a.manifest.weights.items() if b.manifest.weights.get(model) != digest}
    not_comparable: list[Excluded] = []
    in_neither: list[Excluded] = []
    rows: list[dict[str, Any]] = []
    for key, case in ((key, case) for key, case in cases_a.items() if key in cases_b):
        ended = {"A": tidy_a.outcomes[key], "B": tidy_b.outcomes[key]}
        failed = [f"{end.status} in {side}: {end.error}" for side, end in ended.items() if end.status != "ok"]
        if failed:
            (in_neither if len(failed) == 2 else not_comparable).append(Excluded(case=case, reason="; ".join(failed)))
        elif case.model in other_weights:
            not_comparable.append(Excluded(case=case, reason=f"the weights of {case.model} differ"))
        else:
            timed = [phase for phase in timed_phases(a, case) if phase in timed_phases(b, case)]
            rows += [_row(case, phase, tidy_a, tidy_b) for phase in timed]
    return Comparison(
        a=a.name,
        b=b.name,
        labels=(a.label, b.label),
        rows=pd.DataFrame(rows, columns=ROW_COLUMNS).astype(dict.fromkeys(ROW_FLOATS, "float64")),
        only_in_a=_only_in(cases_a, cases_b, tidy_b, other="B"),
        only_in_b=_only_in(cases_b, cases_a, tidy_a, other="A"),
        not_comparable=not_comparable,
        in_neither=in_neither,
        differences=differences(a, b),
        same_machine=kinds(a) == kinds(b),
        fields_apart=_fields_apart(cases_a, cases_b),
    )


def difference(ratio: Ratio) -> Difference:
    """Name what a ratio B / A of times shows, by whether its interval lies below one, above it, or on both sides."""
    if ratio.low is None or ratio.high is None:
        return "too few rounds"
    if ratio.high < 1:
        return "faster"
    return "slower" if ratio.low > 1 else "no difference shown"


def judged(ratio: Ratio, *runs: Run) -> tuple[Ratio, Difference]:
    """Return the ratio of times of `runs` and what it shows: no interval, and nothing, where one is imported."""
    if any(run.manifest.origin is not None for run in runs):
        return msgspec.structs.replace(ratio, low=None, high=None), ELSEWHERE
    return ratio, difference(ratio)


def measured_cases(tidy: Tidy) -> dict[str, Case]:
    """List the cases that a run has a result of, by key."""
    return {plan.case.key: plan.case for plan in tidy.run.manifest.plan if tidy.outcomes[plan.case.key].measured}


def _only_in(own: dict[str, Case], others: dict[str, Case], tidy: Tidy, other: str) -> list[Excluded]:
    """List what the other run, in `tidy`, has no result of."""
    unpaired = [case for key, case in others.items() if key not in own]
    excluded = []
    for key, case in ((key, case) for key, case in own.items() if key not in others):
        reason = f"not in {other}{nearest(case, unpaired)}"
        if key in tidy.outcomes:
            why = tidy.outcomes[key].error
            reason = f"{other} ended before it" if why == NOT_MEASURED else f"not measured in {other}: {why}"
        excluded.append(Excluded(case=case, reason=reason))
    return excluded


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


def _row(case: Case, phase: Phase, tidy_a: Tidy, tidy_b: Tidy) -> dict[str, Any]:
    a, b = (independent_values(tidy.by_case_and_phase[case.key, phase]) for tidy in (tidy_a, tidy_b))
    ratio, verdict = judged(estimators.unpaired_ratio(b, a), tidy_a.run, tidy_b.run)
    times = [*estimators.median_interval(a), *estimators.median_interval(b)]
    figures = dict(zip(ROW_FLOATS, [*times, ratio.estimate, ratio.low, ratio.high], strict=True))
    found = {"phase": phase, "interval": "unpaired", "verdict": verdict}
    return {**msgspec.structs.asdict(case), **figures, **found}


def differences(a: Run, b: Run) -> list[str]:
    """List what differs of the environments, the weights and the kernels; the load of the moment always does.

    Of a run of several machines, also how many cases the other run has of another machine than this one.
    """
    facts_a, facts_b = (
        _facts(run) | {f"weights of {model}": digest for model, digest in run.manifest.weights.items()} | _kernels(run)
        for run in (a, b)
    )
    setup_a, setup_b = _setup(a), _setup(b)
    if setup_a and setup_b:
        facts_a, facts_b = (
            facts_a | dict.fromkeys(setup_b, DEFAULT) | setup_a,
            facts_b | dict.fromkeys(setup_a, DEFAULT) | setup_b,
        )
    both = [name for name in facts_a if name in facts_b and name != "load_1min"]
    lines = [f"{name}: {facts_a[name]} -> {facts_b[name]}" for name in both if facts_a[name] != facts_b[name]]
    if len(a.environments) > 1 or len(b.environments) > 1:
        planned = {item.case for item in b.manifest.plan}
        cases = [item.case for item in a.manifest.plan if item.case in planned]
        moved = sum(a.environment(case).machine != b.environment(case).machine for case in cases)
        lines += [f"machine: another one for {moved} of {len(cases)} cases that both plan"] if moved else []
    return lines


def kinds(run: Run) -> set[tuple[str | int | None, ...]]:
    """Return what decides times on the machines that measured a run: the values of their fingerprints."""
    return {tuple(environment.fingerprint.values()) for environment in run.environments}


def _setup(run: Run) -> dict[str, str]:
    """Return the settings of an imported run's cases, different ones with commas."""
    setups = [item.setup for item in run.manifest.plan]
    names = dict.fromkeys(name for setup in setups for name in setup)
    return {name: ", ".join(dict.fromkeys(setup.get(name, DEFAULT) for setup in setups)) for name in names}


def _kernels(run: Run) -> dict[str, str]:
    """Return which kernels computed each product of `compiled`, those of several processes with commas."""
    return {f"kernel of {product}": kernels for product, kernels in sorted(kernels_of(run.checks).items())}


def _facts(run: Run) -> dict[str, str]:
    """Write each field of the environments that measured a run, the values of several machines with commas."""
    all_of_them = [msgspec.structs.asdict(environment) for environment in run.environments]
    return {name: ", ".join(dict.fromkeys(str(facts[name]) for facts in all_of_them)) for name in all_of_them[0]}
