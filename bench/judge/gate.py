"""Judges a run by stored sessions: exact counters first, on any machine; times only where the machine is known.

Counters decide without a clock: any increase is a regression. Times are judged as shares of the roof that fits the
phase by physics (decode from a cache reads memory, prefill and naive multiply), since the memory bandwidth of a shared
machine can double within an hour while its compute stands still.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from bench.analysis import cautions
from bench.analysis.tidy import Tidy
from bench.case import Case
from bench.errors import DataError, FailedRun
from bench.judge.baseline import newest, refuse_unfit, session_of
from bench.judge.compare import nearest
from bench.judge.tolerance import MIN_SESSIONS, slow_down, tolerance
from bench.judge.verdict import Verdict, VerdictKind
from bench.record import Run
from bench.store.run_folder import find_run, read_run
from bench.store.sessions import CaseFigures, Session, read_sessions
from kvcache.arithmetic.costs import Phase
from kvcache.proof.counters import Counters
from kvcache.strategies.catalogue import REFEEDING

EXACT = tuple(name for name in Counters.__struct_fields__ if name != "steps")
"""Names of the counters; `steps` says how much was counted, and must be equal for them to be comparable."""

Share = Literal["mfu", "mbu"]

MAX_READ_RATIO = 1.1
"""Reads that differ by more are other roofs: those of runs whose cells have other strategies differ by less."""


def read_baseline(path: str, out: Path) -> list[Session]:
    """Read the sessions at `path`: a folder with a file for each, or one run (its folder, or its name under `out`).

    Raises:
        DataError: there is none, one is damaged or of a newer schema, or a run cannot be a baseline.
    """
    folder = Path(path)
    try:
        if folder.is_dir() and not (folder / "manifest.json").is_file():
            return read_sessions(folder)
    except PermissionError as error:
        raise DataError(f"--baseline {path}: cannot be read ({error.strerror})") from error
    try:
        found = find_run(path, out)
    except DataError:
        raise DataError(
            f"--baseline {path}: no run folder and no folder of sessions; `kvbench baseline promote RUN --name NAME` "
            "makes one of those, results/baselines/NAME"
        ) from None
    try:
        tidy = Tidy.of(read_run(found))
        refuse_unfit(tidy)
        return [session_of(tidy)]
    except (DataError, FailedRun) as error:
        raise DataError(f"--baseline {error}") from error


def gate(run: Run, sessions: Sequence[Session]) -> list[Verdict]:
    """Give every verdict on `run`. The newest session sets the cases and their counters, all of them the times.

    Raises:
        DataError: the counters of a case differ between its processes.
    """
    tidy = Tidy.of(run)
    base, head = newest(sessions), session_of(tidy)
    verdicts = list(_cases(tidy, base, head))
    judged = base.by_case_and_phase.keys() & head.by_case_and_phase.keys()
    for key in (key for key in head.by_case_and_phase if key in judged):
        verdicts += _counters(base.by_case_and_phase[key], head.by_case_and_phase[key])
    return verdicts + _times(tidy, sessions, head, [key for key in head.by_case_and_phase if key in judged])


def share_of(case: Case, phase: Phase) -> Share:
    """Choose the roof that a phase is held against: read bandwidth for decode from a cache, else the GEMM rate."""
    return "mbu" if phase == "decode" and case.strategy not in REFEEDING else "mfu"


def _cases(tidy: Tidy, base: Session, head: Session) -> Iterator[Verdict]:
    """Give a verdict on what failed, what is missing, and what is new."""
    ended = tidy.outcomes
    tolerated = {"ok", "unsupported"} if any(end.status != "unsupported" for end in ended.values()) else {"ok"}
    failed = {key: end for key, end in ended.items() if end.status not in tolerated and end.measured}
    cases = {plan.case.key: plan.case for plan in tidy.run.manifest.plan}
    for key, end in failed.items():
        detail = f"{end.status}: {end.error}"
        yield Verdict(case=cases[key], phase="prefill", kind="failed", quantity="tokens_match", detail=detail)
    unknown = [case for key, case in cases.items() if (key, "prefill") not in base.by_case_and_phase]
    for (key, phase), row in base.by_case_and_phase.items():
        if (key, phase) not in head.by_case_and_phase and key not in failed:
            why = ended[key].error if key in ended else f"not in the run{nearest(row.case, unknown)}"
            yield Verdict(case=row.case, phase=phase, kind="missing", quantity="tokens_match", detail=str(why))
    for (key, phase), row in head.by_case_and_phase.items():
        if (key, phase) not in base.by_case_and_phase:
            detail = "not in the baseline: promote a run to have it watched"
            yield Verdict(case=row.case, phase=phase, kind="new", quantity="tokens_match", detail=detail)


def _counters(base: CaseFigures, head: CaseFigures) -> Iterator[Verdict]:
    """Give a verdict per counter, and one on whether the tokens match naive's as they did in the baseline."""
    case, phase = head.case, head.phase
    if head.tokens_match == base.tokens_match:
        yield Verdict(case=case, phase=phase, kind="same", quantity="tokens_match")
    else:  # both are allowed here (`Outcome`): an exact strategy whose tokens are `false` has failed
        detail = f"`{head.tokens_match}`, in the baseline `{base.tokens_match}`"
        yield Verdict(case=case, phase=phase, kind="not-comparable", quantity="tokens_match", detail=detail)
    if base.counters.steps != head.counters.steps:
        detail = f"{head.counters.steps} decode steps were counted, {base.counters.steps} in the baseline"
        yield Verdict(case=case, phase=phase, kind="missing", quantity="counters", detail=detail)
        return
    for name in EXACT:
        before, now = getattr(base.counters, name), getattr(head.counters, name)
        kind: VerdictKind = "same" if now == before else "regression" if now > before else "faster"
        yield Verdict(case=case, phase=phase, kind=kind, quantity=name, base=before, head=now)


def _times(tidy: Tidy, sessions: Sequence[Session], head: Session, keys: Sequence[tuple[str, Phase]]) -> list[Verdict]:
    """Give a verdict on the time of each case and phase; where there is no ground for one, not comparable and why."""
    grounds = {key: _ground(sessions, head, key) for key in keys}
    n_judged = sum(not isinstance(ground, str) for ground in grounds.values())
    disturbed = cautions.disturbed(tidy) if n_judged else {}
    verdicts = []
    for (key, phase), ground in grounds.items():
        row = head.by_case_and_phase[key, phase]
        quantity = share_of(row.case, phase)
        blank = Verdict(case=row.case, phase=phase, kind="not-comparable", quantity=quantity)
        share = getattr(row, quantity)
        if isinstance(ground, str):
            verdicts.append(msgspec.structs.replace(blank, detail=ground))
        elif share is None or key in disturbed:
            lost = f"{disturbed[key]:.0%} of its rounds were disturbed" if key in disturbed else ""
            why = lost or f"the run has no {quantity}"
            verdicts.append(msgspec.structs.replace(blank, kind="inconclusive", detail=why))
        else:
            verdicts.append(_judged(blank, share, ground, n_judged))
    return verdicts


def _ground(sessions: Sequence[Session], head: Session, key: tuple[str, Phase]) -> list[float] | str:
    """List the shares of the sessions that this time can be held against, or why it cannot."""
    row = head.by_case_and_phase[key]
    quantity = share_of(row.case, row.phase)
    here = [session for session in sessions if session.comparable(head, row.case) and session.run_id != head.run_id]
    stored = [session.by_case_and_phase.get(key) for session in here]
    counted = [past for past in stored if past is not None and past.counters == row.counters]
    alike = [past for past in counted if not _other_kernels(past, row)]
    if counted and not alike:
        return f"not the kernels of the baseline ({_other_kernels(counted[-1], row)}); --kernels SESSION pins those"
    if quantity == "mbu" and row.mbu is not None:
        alike = [past for past in alike if _same_read(past, row)]
    shares = [share for share in (getattr(past, quantity) for past in alike) if share is not None]
    if not shares and getattr(row, quantity) is None:
        return f"no {quantity}: the table of the run says why"
    if len(shares) < MIN_SESSIONS:
        left_out = ", this run itself left out" if any(session.run_id == head.run_id for session in sessions) else ""
        if others := [past for past in counted if _other_kernels(past, row)]:
            left_out += f", {len(others)} of other kernels left out ({_other_kernels(others[-1], row)})"
        stored_of = "sessions stored of this machine, software, weights and counters"
        return f"{len(shares)} of {MIN_SESSIONS} {stored_of}{left_out}"
    fewest = min(past.samples for past in alike)
    if row.samples < fewest:
        return f"{row.samples} timed rounds, the sessions have {fewest} or more: measure with as many --repetitions"
    return shares


def _other_kernels(past: CaseFigures, row: CaseFigures) -> str:
    """Name the first product that was computed by another kernel, or that only one side names; empty for none."""
    there, here = past.kernels or {}, row.kernels or {}
    for name in sorted(there.keys() | here.keys()):
        if here.get(name) != there.get(name):
            return f"{name}: {here.get(name, 'not known')}, there {there.get(name, 'not known')}"
    return ""


def _same_read(past: CaseFigures, row: CaseFigures) -> bool:
    """Return whether the reads of two shares are about as large, so that the same caches hold of them as much."""
    if past.read_bytes is None or row.read_bytes is None:
        return past.read_bytes == row.read_bytes
    return abs(math.log(past.read_bytes / row.read_bytes)) < math.log(MAX_READ_RATIO)


def _judged(blank: Verdict, share: float, stored: Sequence[float], n_judged: int) -> Verdict:
    expected = tolerance([math.log(value) for value in stored], n_judged)
    effect = slow_down(math.log(share), expected.center)
    limit = math.expm1(expected.width)
    outside = f"; {expected.left_out_alarms} of them stood apart from the others" if expected.left_out_alarms else ""
    return msgspec.structs.replace(
        blank,
        kind="regression" if effect > limit else "faster" if effect < math.expm1(-expected.width) else "same",
        base=math.exp(expected.center),
        head=share,
        effect=effect,
        low=slow_down(math.log(share) + expected.width, expected.center),
        high=slow_down(math.log(share) - expected.width, expected.center),
        detectable=math.expm1(expected.detectable),
        detail=f"tolerance {limit:.1%}, from {expected.n} sessions{outside}",
    )
