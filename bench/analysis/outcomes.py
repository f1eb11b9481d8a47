"""How each case of a run ended: its status, whether its tokens were right, and why it has no time."""

from __future__ import annotations

from collections import Counter

import msgspec

from bench.record import Failure, Run, Status, TokensMatch

NOT_MEASURED = "not measured: the run ended before this case; `kvbench run --resume` measures it"

_WORST_STATUS: list[Status] = ["failed", "oom", "timeout", "unsupported"]
_WORST_MATCH: list[TokensMatch] = ["false", "tie", "true"]


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a case ended, over all of its processes: the worst of each."""

    status: Status
    tokens_match: TokensMatch | None
    error: str | None = None
    measured: bool = True
    """False where the run holds neither a time nor a failure of the case."""


def outcomes(run: Run) -> dict[str, Outcome]:
    """How each planned case ended, by its key. Other tokens are a failure, whichever record reports them."""
    return {plan.case.key: _outcome(run, plan.case.key) for plan in run.manifest.plan}


def _outcome(run: Run, key: str) -> Outcome:
    checks = [check for check in run.checks if check.case == key]
    failures = [failure for failure in run.failures if failure.case == key and not _made_up_for(run, failure)]
    told = [check.tokens_match for check in checks] + [failure.tokens_match for failure in failures]
    matches = [match for match in told if match is not None]
    match = min(matches, key=_WORST_MATCH.index, default=None)
    if failures:
        worst = min(failures, key=lambda failure: _WORST_STATUS.index(failure.status))
        return Outcome(status=worst.status, tokens_match=match, error=worst.error)
    if match == "false":
        return Outcome(status="failed", tokens_match=match, error="emitted other tokens")
    if not any(sample.case == key and not sample.warmup for sample in run.samples):
        return Outcome(status="failed", tokens_match=match, error=NOT_MEASURED, measured=False)
    return Outcome(status="ok", tokens_match=match)


def _made_up_for(run: Run, failure: Failure) -> bool:
    """Whether the worker that died was followed by one that did all the rounds, in a resumed run."""
    rounds = {
        sample.round
        for sample in run.samples
        if (sample.case, sample.process) == (failure.case, failure.process) and not sample.warmup
    }
    return failure.worker_died and len(rounds) >= run.manifest.repetitions


def unfinished(run: Run) -> list[str]:
    """Cases that have fewer rounds than the run was asked for, or none, though they did not fail."""
    wanted = run.manifest.repetitions * run.manifest.processes
    rounds = {(sample.case, sample.process, sample.round) for sample in run.samples if not sample.warmup}
    done = Counter(case for case, _, _ in rounds)
    return [
        key
        for key, ended in outcomes(run).items()
        if not ended.measured or (ended.status == "ok" and done[key] < wanted)
    ]
