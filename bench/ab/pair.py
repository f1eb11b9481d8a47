"""One pair of fresh processes, base and head: both checked, both warmed up, and timed in turns.

Short steps: whole turns in blocks A A B B, B B A A, ...; A B B A where one block is all, A B where a turn is long. Long
steps: both take a turn at once, in lockstep, a step of one and then the same step of the other, so that a moment in
which the machine is slow is in both. Which side is A changes from pair to pair, so that a drift cancels. Sides of one
thread have the same core in a block, and the next core in the next: a core that another program uses is then in the way
of both, and of no whole pair. Where the cores are too few for the threads of both, a side begins only when the other
rests: threads that wait for work spin for some milliseconds before they sleep.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec

from bench.ab.record import NAMES, PairTimes, SideName, Turn
from bench.case import HOST_DEVICES, Case
from bench.errors import DataError
from bench.machine import affinity
from bench.machine.affinity import usable_cores
from bench.measure.schedule import LOAD_TIMEOUT_S, turn_ns
from bench.measure.worker_process import WorkerFailed, WorkerProcess
from bench.protocol import CheckCase, Checked, GoOn, Load, Loaded, Paused, Reply, Request, TakeTurn, TurnTaken

PAIR_S = 1.5
"""How long a case is timed in a pair, if its turns are short. A shared machine is of one speed for some tenths of a
second and then of another: turns of 80 ms scattered by 14 % from pair to pair in a third of this time, by 5 % in it."""

MOST_BLOCKS = 4
"""With twice the turns the fastest are hardly faster, and the pair is the unit."""

LONG_TURN_S = 0.5
"""From here on a turn averages over many steps, and a pair has one whole turn of each side, no block."""

LOCKSTEP_FROM_S = 0.005
"""Mean time of a decode step from which turns are taken in lockstep. Below it, finding the core's caches as the other
side left them would be much of a step."""

CHECK_IS_WARM_UP_FROM_S = 0.02
"""The same from which the check is all the warm-up: it was a turn of each already."""

MOST_SPIN_S, SPIN_POLL_S = 5.0, 0.0005
"""For how long a waiting side's threads may be seen computing, and how often that is looked at. They spin for some
milliseconds of their own; where other programs have the cores, that takes longer."""

LEAST_LOCKSTEP_BLOCKS = 2
"""Of one turn of each side: so that either side is first in one."""


class Manner(NamedTuple):
    """How a case is measured: found in its first pair, and the same in all."""

    lockstep: bool
    warm_up: bool
    """Whether the check is not warm-up enough."""
    turn_s: float
    """How long a turn took there."""


class Answer(NamedTuple):
    """What a worker answered to one request."""

    reply: Reply
    seconds: float
    waited_ns: int | None
    """Time that its threads waited for a core meanwhile (Linux)."""


class SideFailed(Exception):
    """One or both of the sides' workers did not do what they were asked: the status and the error of each such side."""

    def __init__(self, failures: Mapping[SideName, tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{side} {status}: {error}" for side, (status, error) in failures.items()))
        self.failures = failures


class Pair:
    """Both sides' workers of one strategy."""

    def __init__(
        self, number: int, base: WorkerProcess, head: WorkerProcess, timeout_s: float, manners: dict[str, Manner]
    ) -> None:
        """`manners` has those of the cases of earlier pairs, by key, and gets those of this one."""
        self.number, self.timeout_s, self.manners = number, timeout_s, manners
        self.workers: dict[SideName, WorkerProcess] = {"base": base, "head": head}
        self.can_pause = self.crowded = False

    def load(self, case: Case) -> None:
        """Have both load the model, side by side."""
        request = Load(group=case.group, strategy=case.strategy, naive_logits=case.naive_logits, seed=case.seed)
        known = []
        for name, reply in self._both(request, LOAD_TIMEOUT_S).items():
            if not isinstance(reply, Loaded):
                raise SideFailed({name: ("failed", f"answered {type(reply).__name__} to Load")})
            known.append(reply.lockstep)
        self.can_pause = all(known)  # a base of some weeks ago does not know it yet

    def measure(self, key: str, case: Case, reference: Path) -> PairTimes:
        """Check both, warm both up, and time them. `case` has the seed of its prompt, `key` names it over all pairs.

        Raises:
            SideFailed: a side crashed, or emitted other tokens.
            DataError: the sides cannot be compared: they may not use the same cores, time other steps, or compute while
                they wait.
        """
        self.crowded = len(NAMES) * case.n_threads > usable_cores()
        self._equal_terms()
        turn_s, lockstep = self._get_ready(key, case, reference)
        turns_a_block, least = (2, LEAST_LOCKSTEP_BLOCKS) if lockstep else (4, 1)
        blocks = max(least, min(MOST_BLOCKS, round(PAIR_S / (turns_a_block * turn_s))))
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
            raise DataError("base and head time different decode steps: not comparable")
        return PairTimes(case=key, pair=self.number, turns=[turn for turn, _ in taken], lockstep=lockstep)

    def _get_ready(self, key: str, case: Case, reference: Path) -> tuple[float, bool]:
        """Check both and warm both up; how long a turn takes, in seconds, and whether it is to be in lockstep."""
        compiled, known = self._check(case, reference), self.manners.get(key)
        if known and not known.warm_up and not compiled:
            return known.turn_s, known.lockstep
        warmest = self._warm_up()
        turn_s = warmest.wall_ns / 1e9
        if known is None:
            steps_ns = warmest.step_ns or [warmest.prefill_ns]
            step_s = sum(steps_ns) / len(steps_ns) / 1e9
            # Off Linux nothing tells when a side rests.
            may = self.can_pause and case.device in HOST_DEVICES and sys.platform == "linux"
            lockstep = may and step_s >= LOCKSTEP_FROM_S
            warm_up = not lockstep or step_s < CHECK_IS_WARM_UP_FROM_S
            known = self.manners[key] = Manner(lockstep, warm_up, turn_s)
        return turn_s, known.lockstep

    def _check(self, case: Case, reference: Path) -> bool:
        """Have both prove their tokens; whether one compiled on the way."""
        # A base that cannot pause counts operations in any check, so head does, too.
        request = CheckCase(case=case, path=str(reference), count=not self.can_pause)
        # More threads than cores, and those that wait for one another at a product's end spin away what the rest needs.
        replies = self._in_turn(request) if self.crowded else self._both(request, self.timeout_s)
        checks = {name: reply for name, reply in replies.items() if isinstance(reply, Checked)}
        wrong = [name for name, check in checks.items() if check.tokens_match == "false"]
        if wrong:
            raise SideFailed(dict.fromkeys(wrong, ("failed", "emitted other tokens than naive re-feed")))
        return any(check.compile_s is not None for check in checks.values())

    def _warm_up(self) -> Turn:
        """Two turns of each, or one if it is long; the slower side's shorter one."""
        first, second = sides_of(self.number)
        turns = [self._turn(name, -1)[0] for name in (first, second)]
        if min(turn.wall_ns for turn in turns) <= LONG_TURN_S * 1e9:
            # The last one is the first side's, so that its first timed one follows its own as in later blocks.
            turns += [self._turn(name, -1)[0] for name in (second, first)]
        # Each side's shorter one: where the machine is slow for a moment, it takes more turns, not fewer.
        own = [min((turn for turn in turns if turn.side == name), key=lambda turn: turn.wall_ns) for name in NAMES]
        return max(own, key=lambda turn: turn.wall_ns)

    def _choice_of_cores(self, case: Case) -> list[int]:
        """The cores that both sides may use, if they are to take turns on one at a time.

        Not with more threads: those of one side that still wait for work, spinning, would sit on the other's cores. And
        not on CUDA, whose driver has threads that should not wait for the worker's own.
        """
        with self._alive("base"):
            own = sorted(affinity.common(self.workers["base"].pid))
        return own if len(own) > 1 and case.n_threads == 1 and case.device in HOST_DEVICES else []

    def _give(self, chosen: Collection[int]) -> None:
        for name, worker in self.workers.items():
            with self._alive(name):
                try:
                    affinity.give(worker.pid, chosen)
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
        self._let_rest(_other(name))
        answer = self._ask(name, TakeTurn(), self.timeout_s)
        taken = _turn_taken(name, answer.reply)
        return _turn_of(name, block, taken, turn_ns(taken), answer.waited_ns), taken.steps

    def _turns_in_lockstep(self, block: int) -> list[tuple[Turn, list[int]]]:
        """A turn of each side, and which steps it timed. Who is first changes with every block."""
        answers: dict[SideName, list[Answer]] = {name: [] for name in sides_of(self.number + block)}
        under_way, began_ns = list(answers), time.monotonic_ns()
        while under_way:
            for name in list(under_way):
                own = answers[name]
                request = GoOn() if own else TakeTurn(lockstep=True)
                left_s = max(0.0, self.timeout_s - sum(answer.seconds for answer in own))
                self._let_rest(_other(name))
                own.append(self._ask(name, request, left_s))
                if not isinstance(own[-1].reply, Paused):
                    under_way.remove(name)
        wall_ns = time.monotonic_ns() - began_ns
        turns = []
        for name in NAMES:
            taken = _turn_taken(name, answers[name][-1].reply)
            turn = _turn_of(name, block, taken, wall_ns, _sum(answer.waited_ns for answer in answers[name]))
            prefill_waited_ns = answers[name][0].waited_ns
            turns.append((msgspec.structs.replace(turn, prefill_waited_ns=prefill_waited_ns), taken.steps))
        return turns

    def _ask(self, name: SideName, request: Request, timeout_s: float) -> Answer:
        """What one side answers, how long it took, and how much of that its threads waited for a core."""
        worker = self.workers[name]
        began, before_ns = time.monotonic(), affinity.waited_ns(worker.pid)
        try:
            reply = worker.ask(request, timeout_s)
        except WorkerFailed as failure:
            raise SideFailed({name: (failure.status, failure.error)}) from failure
        after_ns = affinity.waited_ns(worker.pid)
        waited_ns = None if before_ns is None or after_ns is None else after_ns - before_ns
        return Answer(reply, time.monotonic() - began, waited_ns)

    def _let_rest(self, name: SideName) -> None:
        """Wait until the threads of a side sleep, where they would be in the other's way.

        Raises:
            SideFailed: its process is gone.
            DataError: they go on computing.
        """
        if not self.crowded or sys.platform != "linux":
            return
        deadline = time.monotonic() + MOST_SPIN_S
        with self._alive(name):
            while not affinity.at_rest(self.workers[name].pid):
                if time.monotonic() > deadline:
                    raise DataError(
                        f"{name}'s worker computes while it waits (as with OMP_WAIT_POLICY=active), and there are not "
                        "enough cores for both: not comparable; give fewer --threads"
                    )
                time.sleep(SPIN_POLL_S)

    def _both(self, request: Request, timeout_s: float) -> dict[SideName, Reply]:
        """What both answer, side by side."""
        replies: dict[SideName, Reply] = {}
        failures: dict[SideName, tuple[str, str]] = {}
        for worker in self.workers.values():
            worker.send(request)
        for name in sides_of(self.number):
            try:
                replies[name] = self.workers[name].receive(timeout_s)
            except WorkerFailed as failure:
                failures[name] = failure.status, failure.error
        if failures:
            raise SideFailed(failures)
        return replies

    def _in_turn(self, request: Request) -> dict[SideName, Reply]:
        """What each answers while the other rests."""
        replies: dict[SideName, Reply] = {}
        failures: dict[SideName, tuple[str, str]] = {}
        for name in sides_of(self.number):
            try:
                if not failures:  # whose process may be gone
                    self._let_rest(_other(name))
                replies[name] = self._ask(name, request, self.timeout_s).reply
            except SideFailed as failed:
                failures |= failed.failures
        if failures:
            raise SideFailed(failures)
        return replies

    def _equal_terms(self) -> None:
        found: dict[SideName, str] = {}
        for name, worker in self.workers.items():
            with self._alive(name):
                found[name] = affinity.terms(worker.pid)
        if found["base"] != found["head"]:
            raise DataError(f"base's worker may use {found['base']}, head's {found['head']}: not comparable")


def sides_of(number: int) -> tuple[SideName, SideName]:
    """First and second side of pair `number`."""
    return NAMES if number % 2 == 0 else (NAMES[1], NAMES[0])


def _other(name: SideName) -> SideName:
    return NAMES[1 - NAMES.index(name)]


def turn_order(number: int, block: int, blocks: int) -> list[SideName]:
    """Whose the four turns of a block are, in pair `number`.

    Of several blocks, each side has two turns in a row, the second of which finds the core's caches as it left them.
    """
    first, second = sides_of(number)
    if blocks == 1:
        return [first, second, second, first]
    order = [first, first, second, second]
    return order if block % 2 == 0 else order[::-1]


def _turn_taken(name: SideName, reply: Reply) -> TurnTaken:
    if not isinstance(reply, TurnTaken):
        raise SideFailed({name: ("failed", f"answered {type(reply).__name__} to TakeTurn")})
    return reply


def _turn_of(name: SideName, block: int, taken: TurnTaken, wall_ns: int, waited_ns: int | None) -> Turn:
    """What is kept of a turn."""
    return Turn(
        side=name,
        block=block,
        prefill_ns=taken.prefill_event_ns if taken.prefill_event_ns is not None else taken.prefill_ns,
        step_ns=taken.step_event_ns if taken.step_event_ns is not None else taken.step_ns,
        wall_ns=wall_ns,
        waited_ns=waited_ns,
        steal_ns=taken.covariates.steal_ns,
    )


def _sum(parts: Iterable[int | None]) -> int | None:
    """None if a part is unknown."""
    total = 0
    for part in parts:
        if part is None:
            return None
        total += part
    return total
