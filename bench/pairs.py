"""One pair of fresh processes, base and head: both checked, both warmed up, and timed in turns.

Short steps: whole turns in blocks A A B B, B B A A, ...; A B B A where one block is all, A B where a turn is long. Long
steps: both take a turn at once, in lockstep, a step of one and then the same step of the other, so that a moment in
which the machine is slow is in both. Which side is A changes from pair to pair, so that a drift cancels. Sides of one
thread have the same core in a block, and the next core in the next: a core that another program uses is then in the way
of both, and of no whole pair.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec

from bench import cores
from bench.arm import Arm, ArmFailed
from bench.case import Case
from bench.environment import usable_cores
from bench.protocol import CheckCase, Checked, GoOn, Load, Loaded, Reply, Request, TakeTurn, TurnTaken
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

LOCKSTEP_FROM_S = 0.005
"""Mean time of a token from which turns are taken in lockstep. Below it, finding the core's caches as the other side
left them would be much of a step."""

NO_WARM_UP_FROM_S = 0.02
"""The same of the check, from which the check is all the warm-up that a pair has: it was a turn of each already."""

IDLE_SHARE, IDLE_S = 0.25, 0.05
"""What a waiting side may use of a core: threads that wait for work spin for some milliseconds before they sleep."""

LEAST_LOCKSTEP = 2
"""Blocks in lockstep, of one turn of each side: so that either side is first in one."""


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """One turn of one side."""

    side: SideName
    block: int
    prefill_ns: int
    step_ns: list[int]
    """Of each timed decode step."""
    wall_ns: int
    """Of both phases; in lockstep of the other side's turn too."""
    waited_ns: int | None
    """Time that the worker's threads waited for a core, all of them together (Linux)."""
    steal_ns: int | None


class PairTimes(msgspec.Struct, frozen=True, kw_only=True, tag="pair"):
    """The turns of one case in one process pair."""

    case: str
    pair: int
    turns: list[Turn]
    lockstep: bool = False
    """Whether base's and head's turns were taken at once, a step of one and then the same step of the other."""


class PairFailure(msgspec.Struct, frozen=True, kw_only=True, tag="pair-failure"):
    """A side that could not be measured, and why."""

    case: str
    pair: int
    side: SideName
    status: str
    error: str


class Pace(NamedTuple):
    """How long something takes, in seconds."""

    turn_s: float
    token_s: float
    """On average, the first one's prefill included."""


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
        self.can_lockstep = False

    def load(self, case: Case) -> None:
        """Have both load the model, side by side."""
        request = Load(group=case.group, strategy=case.strategy, naive_logits=case.naive_logits, seed=case.seed)
        replies = self._both(request, LOAD_TIMEOUT_S)
        for name, reply in replies.items():
            if not isinstance(reply, Loaded):
                raise SideFailed({name: ("failed", f"answered {type(reply).__name__} to Load")})
        # A base of some weeks ago does not know it yet.
        self.can_lockstep = all(isinstance(reply, Loaded) and reply.lockstep for reply in replies.values())

    def measure(self, key: str, case: Case, reference: Path) -> PairTimes:
        """Check both, warm both up, and time them. `case` has this pair's seed, `key` names it over all pairs.

        Raises:
            SideFailed: a side crashed, or emitted other tokens.
            DataError: the sides cannot be compared: they may not use the same cores, or time other steps.
        """
        self._equal_terms()
        may_lockstep = self.can_lockstep and case.device == "cpu"
        turn_s, token_s = self._check(case, reference)
        if not (may_lockstep and token_s >= NO_WARM_UP_FROM_S):
            turn_s, token_s = self._warm_up()
        lockstep = may_lockstep and token_s >= LOCKSTEP_FROM_S
        turns_a_block = 2 if lockstep else 4
        blocks = max(1, min(MOST_BLOCKS, round(PAIR_S / (turns_a_block * turn_s))))
        blocks = max(LEAST_LOCKSTEP, blocks) if lockstep else blocks
        self._equal_terms()
        own = self._choice_of_cores(case) if blocks > 1 else []
        taken: list[tuple[Turn, list[int]]] = []
        for block in range(blocks):
            if own:
                # Two pairs after one another, which differ in who is first, have the same cores.
                self._give({own[(self.number // 2 + block) % len(own)]})
            if lockstep:
                taken += self._turns_in_lockstep(block)
            else:
                order = turn_order(self.number, block, blocks) if turn_s <= LONG_TURN_S else sides_of(self.number)
                taken += [self._turn(name, block) for name in order]
            self._equal_terms()
        if own:
            self._give(own)
        if len({tuple(steps) for _, steps in taken}) > 1:
            raise DataError(f"{key}: base and head time different decode steps: not comparable")
        return PairTimes(case=key, pair=self.number, turns=[turn for turn, _ in taken], lockstep=lockstep)

    def _check(self, case: Case, reference: Path) -> Pace:
        """Have both prove their tokens; how long that took a side, nothing if it compiled on the way."""
        # More threads than cores, and those that wait for one another at a product's end spin away what the rest needs.
        at_once = len(NAMES) * case.n_threads <= usable_cores()
        request, began = CheckCase(case=case, path=str(reference), count=False), time.monotonic()
        replies = self._both(request, self.timeout_s) if at_once else self._in_turn(request)
        seconds = (time.monotonic() - began) / (1 if at_once else len(NAMES))
        checks = {name: reply for name, reply in replies.items() if isinstance(reply, Checked)}
        wrong = [name for name, check in checks.items() if check.tokens_match == "false"]
        if wrong:
            raise SideFailed(dict.fromkeys(wrong, ("failed", "emitted other tokens than naive re-feed")))
        if any(check.compile_s is not None for check in checks.values()):
            return Pace(0.0, 0.0)
        return Pace(seconds, seconds / max(check.positions_checked for check in checks.values()))

    def _warm_up(self) -> Pace:
        """Two turns of each; how long the slower side's were."""
        # The last one is the first side's, so that its first timed one follows its own as in later blocks.
        turns = [self._turn(name, -1)[0] for name in turn_order(self.number, -1, 1)]
        # Each side's shorter one: where the machine is slow for a moment, it takes more turns, not fewer.
        own = [min((turn for turn in turns if turn.side == name), key=lambda turn: turn.wall_ns) for name in NAMES]
        slower = max(own, key=lambda turn: turn.wall_ns)
        return Pace(slower.wall_ns / 1e9, slower.wall_ns / (1 + len(slower.step_ns)) / 1e9)

    def _choice_of_cores(self, case: Case) -> list[int]:
        """The cores that both sides may use, if they are to take turns on one at a time.

        Not with more threads: those of one side that still wait for work, spinning, would sit on the other's cores. And
        not on CUDA, whose driver has threads that should not wait for the worker's own.
        """
        with self._alive("base"):
            own = sorted(cores.common(self.workers["base"].pid))
        return own if len(own) > 1 and case.n_threads == 1 and case.device == "cpu" else []

    def _give(self, chosen: Collection[int]) -> None:
        for name, worker in self.workers.items():
            with self._alive(name):
                try:
                    cores.give(worker.pid, chosen)
                except FileNotFoundError:
                    raise
                except OSError as error:
                    raise DataError(f"{name}'s worker cannot be given cores: {error.strerror}") from error

    @contextmanager
    def _alive(self, name: SideName) -> Iterator[None]:
        """What is done with a worker that may be gone: the out-of-memory killer chooses among sleeping ones too."""
        try:
            yield
        except FileNotFoundError as error:
            failure = self.workers[name].death()
            raise SideFailed({name: (failure.status, failure.error)}) from error

    def _turn(self, name: SideName, block: int) -> tuple[Turn, list[int]]:
        """A turn of one side, and which steps it timed."""
        before = self._waited_ns(name)
        reply = self._ask(name, TakeTurn())
        assert isinstance(reply, TurnTaken)
        return _turn_of(name, block, reply, before, self._waited_ns(name), turn_ns(reply)), reply.steps

    def _turns_in_lockstep(self, block: int) -> list[tuple[Turn, list[int]]]:
        """A turn of each side, and which steps it timed. Who is first changes with every block."""
        before, finished, n_tokens = self._waited_ns(*NAMES), dict[SideName, TurnTaken](), 0
        while len(finished) < len(NAMES):
            for name in sides_of(self.number + block):
                if name not in finished:
                    reply = self._ask(name, GoOn() if n_tokens else TakeTurn(lockstep=True))
                    if isinstance(reply, TurnTaken):
                        finished[name] = reply
            n_tokens += 1
        after, wall_ns = self._waited_ns(*NAMES), sum(map(turn_ns, finished.values()))
        return [(_turn_of(name, block, finished[name], before, after, wall_ns), finished[name].steps) for name in NAMES]

    def _ask(self, name: SideName, request: Request) -> Reply:
        try:
            return self.workers[name].ask(request, self.timeout_s)
        except ArmFailed as failure:
            raise SideFailed({name: (failure.status, failure.error)}) from failure

    def _waited_ns(self, *names: SideName) -> dict[SideName, int | None]:
        return {name: cores.waited_ns(self.workers[name].pid) for name in names}

    def _both(self, request: Request, timeout_s: float) -> dict[SideName, Reply]:
        """What both answer, side by side."""
        replies: dict[SideName, Reply] = {}
        failures: dict[SideName, tuple[str, str]] = {}
        for worker in self.workers.values():
            worker.send(request)
        for name in sides_of(self.number):
            try:
                replies[name] = self.workers[name].receive(timeout_s)
            except ArmFailed as failure:
                failures[name] = failure.status, failure.error
        if failures:
            raise SideFailed(failures)
        return replies

    def _in_turn(self, request: Request) -> dict[SideName, Reply]:
        """What each answers while the other waits, which it has to do without using the cores.

        Raises:
            SideFailed: a side crashed.
            DataError: a waiting side computes, and so would be in the way of the other's times.
        """
        replies: dict[SideName, Reply] = {}
        failures: dict[SideName, tuple[str, str]] = {}
        first, second = sides_of(self.number)
        for name, idle in ((first, second), (second, first)):
            began, before_ns = time.monotonic(), self.workers[idle].cpu_ns
            try:
                replies[name] = self.workers[name].ask(request, self.timeout_s)
            except ArmFailed as failure:
                failures[name] = failure.status, failure.error
            used_s, seconds = (self.workers[idle].cpu_ns - before_ns) / 1e9, time.monotonic() - began
            if idle not in failures and used_s > max(IDLE_S, IDLE_SHARE * seconds):
                raise DataError(
                    f"{idle}'s worker keeps a core busy while it waits (as with OMP_WAIT_POLICY=active), and there are "
                    "not enough for both: not comparable; give fewer --threads"
                )
        if failures:
            raise SideFailed(failures)
        return replies

    def _equal_terms(self) -> None:
        found: dict[SideName, str] = {}
        for name, worker in self.workers.items():
            with self._alive(name):
                found[name] = cores.terms(worker.pid)
        if found["base"] != found["head"]:
            raise DataError(f"base's worker may use {found['base']}, head's {found['head']}: not comparable")


def sides_of(number: int) -> tuple[SideName, SideName]:
    """First and second side of pair `number`."""
    return NAMES if number % 2 == 0 else (NAMES[1], NAMES[0])


def turn_order(number: int, block: int, blocks: int) -> list[SideName]:
    """Whose the four turns of a block are, in pair `number`.

    Of several blocks, each side has two turns in a row, the second of which finds the core's caches as it left them.
    """
    first, second = sides_of(number)
    if blocks == 1:
        return [first, second, second, first]
    order = [first, first, second, second]
    return order if block % 2 == 0 else order[::-1]


def _turn_of(
    name: SideName,
    block: int,
    taken: TurnTaken,
    before: Mapping[SideName, int | None],
    after: Mapping[SideName, int | None],
    wall_ns: int,
) -> Turn:
    """What is kept of a turn; `before` and `after` it the workers had waited so long for a core."""
    began_ns, ended_ns = before[name], after[name]
    return Turn(
        side=name,
        block=block,
        prefill_ns=taken.prefill_event_ns if taken.prefill_event_ns is not None else taken.prefill_ns,
        step_ns=taken.step_event_ns if taken.step_event_ns is not None else taken.step_ns,
        wall_ns=wall_ns,
        waited_ns=None if began_ns is None or ended_ns is None else ended_ns - began_ns,
        steal_ns=taken.covariates.steal_ns,
    )
