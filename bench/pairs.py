"""One pair of fresh processes, base and head: both checked, both warmed up, and timed in blocks A B B A.

In such a block each side has as many turns right after its own as after the other's, whose caches it finds. Which side
is A changes from pair to pair, so that a drift cancels.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import msgspec

from bench.arm import Arm, ArmFailed
from bench.case import Case, Phase
from bench.environment import usable_cores
from bench.protocol import CheckCase, Checked, Load, Loaded, Reply, Request, TakeTurn, TurnTaken
from bench.rounds import CLOCK_TICK_NS, STEAL_SHARE
from bench.schedule import LOAD_TIMEOUT_S, turn_ns
from bench.sides import SideName
from bench.store import DataError

NAMES: tuple[SideName, SideName] = ("base", "head")

PAIR_S = 0.5
"""How long a case is timed in a pair, if its turns are short. With twice the turns the fastest are hardly faster, and
the pair is the unit."""

MOST_BLOCKS = 4
LONG_TURN_S = 0.5
"""From here on a turn averages over many steps, and a pair has one turn of each side, no block."""


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """One turn of one side."""

    side: SideName
    block: int
    prefill_ns: int
    step_ns: float | None
    """Mean time of the timed decode steps; None without any."""
    wall_ns: int
    """Of both phases."""
    waited_ns: int | None
    """Time that the worker's threads waited for a core, all of them together (Linux)."""
    steal_ns: int | None


class PairTimes(msgspec.Struct, frozen=True, kw_only=True, tag="pair"):
    """The turns of one case in one process pair."""

    case: str
    pair: int
    turns: list[Turn]


class PairFailure(msgspec.Struct, frozen=True, kw_only=True, tag="pair-failure"):
    """A side that could not be measured, and why."""

    case: str
    pair: int
    side: SideName
    status: str
    error: str


class SideFailed(Exception):
    """One or both of the sides' workers did not do what they were asked: the status and the error of each such side."""

    def __init__(self, failures: Mapping[SideName, tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{side} {status}: {error}" for side, (status, error) in failures.items()))
        self.failures = failures


class Pair:
    """Both sides' workers of one strategy."""

    def __init__(self, number: int, base: Arm, head: Arm, timeout_s: float) -> None:
        self.number, self.timeout_s = number, timeout_s
        self.workers: dict[SideName, Arm] = {"base": base, "head": head}
        self.first, self.second = NAMES if number % 2 == 0 else NAMES[::-1]

    def load(self, case: Case) -> None:
        """Have both load the model, side by side."""
        request = Load(group=case.group, strategy=case.strategy, naive_logits=case.naive_logits, seed=case.seed)
        for name, reply in self._both(request, LOAD_TIMEOUT_S).items():
            if not isinstance(reply, Loaded):
                raise SideFailed({name: ("failed", f"answered {type(reply).__name__} to Load")})

    def measure(self, key: str, case: Case, reference: Path) -> PairTimes:
        """Check both, warm both up, and time them. `case` has this pair's seed, `key` names it over all pairs.

        Raises:
            SideFailed: a side crashed, or emitted other tokens.
            DataError: the sides cannot be compared: they may not use the same cores, or time other steps.
        """
        self._equal_terms()
        # More threads than cores, and those that wait for one another at a product's end spin away what the rest needs.
        at_once = len(NAMES) * case.n_threads <= usable_cores()
        replies = self._both(CheckCase(case=case, path=str(reference)), self.timeout_s, at_once=at_once)
        checks = {name: reply for name, reply in replies.items() if isinstance(reply, Checked)}
        wrong = [name for name, check in checks.items() if check.tokens_match == "false"]
        if wrong:
            raise SideFailed(dict.fromkeys(wrong, ("failed", "emitted other tokens than naive re-feed")))
        # The last warm-up turn is the first side's, so that its first timed one follows its own as in later blocks.
        longest_s = max(self._turn(name, -1)[0].wall_ns for name in (self.first, self.second, self.first)) / 1e9
        order = [self.first, self.second] if longest_s > LONG_TURN_S else [self.first, *[self.second] * 2, self.first]
        blocks = max(1, min(MOST_BLOCKS, round(PAIR_S / (longest_s * len(order)))))
        taken = [self._turn(name, block) for block in range(blocks) for name in order]
        self._equal_terms()
        if len({tuple(steps) for _, steps in taken}) > 1:
            raise DataError(f"{key}: base and head time different decode steps: not comparable")
        return PairTimes(case=key, pair=self.number, turns=[turn for turn, _ in taken])

    def _turn(self, name: SideName, block: int) -> tuple[Turn, list[int]]:
        worker = self.workers[name]
        before = waited_ns(worker.pid)
        try:
            reply = worker.ask(TakeTurn(), self.timeout_s)
        except ArmFailed as failure:
            raise SideFailed({name: (failure.status, failure.error)}) from failure
        after = waited_ns(worker.pid)
        assert isinstance(reply, TurnTaken)
        steps = reply.step_event_ns if reply.step_event_ns is not None else reply.step_ns
        prefill_ns = reply.prefill_event_ns if reply.prefill_event_ns is not None else reply.prefill_ns
        turn = Turn(
            side=name,
            block=block,
            prefill_ns=prefill_ns,
            step_ns=sum(steps) / len(steps) if steps else None,
            wall_ns=turn_ns(reply),
            waited_ns=None if before is None or after is None else after - before,
            steal_ns=reply.covariates.steal_ns,
        )
        return turn, reply.steps

    def _both(self, request: Request, timeout_s: float, *, at_once: bool = True) -> dict[SideName, Reply]:
        replies: dict[SideName, Reply] = {}
        failures: dict[SideName, tuple[str, str]] = {}
        if at_once:
            for worker in self.workers.values():
                worker.send(request)
        for name in (self.first, self.second):
            worker = self.workers[name]
            try:
                if not at_once:
                    worker.send(request)
                replies[name] = worker.receive(timeout_s)
            except ArmFailed as failure:
                failures[name] = failure.status, failure.error
        if failures:
            raise SideFailed(failures)
        return replies

    def _equal_terms(self) -> None:
        base, head = (terms(self.workers[name].pid) for name in NAMES)
        if base != head:
            raise DataError(f"base's worker may use {base}, head's {head}: not comparable")


def figure(times: PairTimes, phase: Phase, n_threads: int) -> float | None:
    """The pair's one figure: log of head's time / base's in the fastest turn of each; None where a side has none.

    Other programs only ever add to a time, and on a shared machine they add to many turns, a different share on each
    side: in 88 pairs of one revision with itself on two shared cores the fastest turns' ratio scattered by 1.3 %
    (decode; 2.7 % prefill), the median over blocks by 4.9 % (4.3 %). A turn is a whole phase, so what a change adds to
    every one shows in the fastest; a cost that only some turns pay does not.
    """
    turns = fastest(times, phase, n_threads)
    if len(turns) < len(NAMES):
        return None
    base, head = (time_ns(turns[name], phase) for name in NAMES)
    return math.log(head / base)


def fastest(times: PairTimes, phase: Phase, n_threads: int) -> dict[SideName, Turn]:
    """Each side's turn with the fastest `phase`, but for those from which the hypervisor took a share of the CPU time.

    That share is the one of `rounds.measured_turns`.
    """
    found: dict[SideName, Turn] = {}
    for turn in times.turns:
        best = found.get(turn.side)
        if not _was_stolen_from(turn, n_threads) and (best is None or time_ns(turn, phase) < time_ns(best, phase)):
            found[turn.side] = turn
    return found


def time_ns(turn: Turn, phase: Phase) -> float:
    """The phase's time: TTFT, or TPOT over the timed steps."""
    time = turn.prefill_ns if phase == "prefill" else turn.step_ns
    assert time is not None
    return time


def waited_ns(pid: int) -> int | None:
    """How long the threads of `pid` have been ready to run without a core (proc(5), schedstat); None off Linux."""
    total = 0
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return None
    for task in tasks:
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended meanwhile
            total += int((task / "schedstat").read_text(encoding="ascii").split()[1])
    return total


def terms(pid: int) -> str:
    """The cores and the priority that the threads of `pid` have: what must be equal for two times to be comparable."""
    if not hasattr(os, "sched_getaffinity"):
        return "any core"
    found = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(ProcessLookupError):
            cores = ",".join(map(str, sorted(os.sched_getaffinity(int(task.name)))))
            found.add(f"cores {cores} at nice {os.getpriority(os.PRIO_PROCESS, int(task.name))}")
    return " and ".join(sorted(found))


def _was_stolen_from(turn: Turn, n_threads: int) -> bool:
    return turn.steal_ns is not None and turn.steal_ns > max(CLOCK_TICK_NS, STEAL_SHARE * turn.wall_ns * n_threads)
