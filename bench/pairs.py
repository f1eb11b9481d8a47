"""One pair of fresh processes, base and head: both checked, both warmed up, and timed in blocks A A B B, B B A A, ...

Where turns are so long that one block is all, it is A B B A, or A B. Which side is A changes from pair to pair, so that
a drift cancels. Sides of one thread have the same core in a block, and the next core in the next: a core that another
program uses is then in the way of both, and of no whole pair.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np

from bench import cores
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
    step_ns: list[int]
    """Of each timed decode step."""
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
        self.first, self.second = sides_of(number)

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
        warm_ups = [(name, self._turn(name, -1)[0].wall_ns) for name in turn_order(self.number, -1, 1)]
        # Each side's shorter one: where the machine is slow for a moment, it takes more turns, not fewer.
        turn_s = max(min(ns for side, ns in warm_ups if side == name) for name in NAMES) / 1e9
        blocks = max(1, min(MOST_BLOCKS, round(PAIR_S / (4 * turn_s))))
        self._equal_terms()
        own = self._choice_of_cores(case) if blocks > 1 else []
        taken = []
        for block in range(blocks):
            if own:
                # Two pairs after one another, which differ in who is first, have the same cores.
                self._give({own[(self.number // 2 + block) % len(own)]})
            order = turn_order(self.number, block, blocks) if turn_s <= LONG_TURN_S else sides_of(self.number)
            taken += [self._turn(name, block) for name in order]
            self._equal_terms()
        if own:
            self._give(own)
        if len({tuple(steps) for _, steps in taken}) > 1:
            raise DataError(f"{key}: base and head time different decode steps: not comparable")
        return PairTimes(case=key, pair=self.number, turns=[turn for turn, _ in taken])

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
        worker = self.workers[name]
        before = cores.waited_ns(worker.pid)
        try:
            reply = worker.ask(TakeTurn(), self.timeout_s)
        except ArmFailed as failure:
            raise SideFailed({name: (failure.status, failure.error)}) from failure
        after = cores.waited_ns(worker.pid)
        assert isinstance(reply, TurnTaken)
        steps = reply.step_event_ns if reply.step_event_ns is not None else reply.step_ns
        prefill_ns = reply.prefill_event_ns if reply.prefill_event_ns is not None else reply.prefill_ns
        turn = Turn(
            side=name,
            block=block,
            prefill_ns=prefill_ns,
            step_ns=steps,
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


def figure(times: PairTimes, phase: Phase, n_threads: int) -> float | None:
    """The pair's one figure: log of head's time / base's, both by `fastest_ns`; None where the machine let none count.

    Other programs only ever add to a time, and on a shared machine they add to many, a different share on each side.
    What a change adds to every step, or to the same step of every turn, shows in the fastest; a cost whose place
    differs from turn to turn does not, however regular it is.
    """
    turns = undisturbed(times, n_threads)
    base, head = (fastest_ns(turns[name], phase) for name in NAMES)
    return math.log(head / base) if base and head else None


def undisturbed(times: PairTimes, n_threads: int) -> dict[SideName, list[Turn]]:
    """Each side's turns, but for those in which the hypervisor took a share of the CPU time, and their opposites.

    That share is the one of `rounds.measured_turns`. The other side's turn goes too, so that both have as many: of
    more, the fastest is faster.
    """
    both = zip(*([turn for turn in times.turns if turn.side == name] for name in NAMES), strict=True)
    kept = [pair for pair in both if not any(_was_stolen_from(turn, n_threads) for turn in pair)]
    return {name: [pair[at] for pair in kept] for at, name in enumerate(NAMES)}


def fastest_ns(turns: Sequence[Turn], phase: Phase) -> float | None:
    """TTFT of the fastest prefill, or TPOT of a decode with each of its steps as fast as in the fastest of `turns`.

    None without turns. Step by step, because a turn of many steps is seldom undisturbed as a whole.
    """
    if not turns:
        return None
    if phase == "prefill":
        return min(turn.prefill_ns for turn in turns)
    return float(np.min([turn.step_ns for turn in turns], axis=0).mean())


def _was_stolen_from(turn: Turn, n_threads: int) -> bool:
    return turn.steal_ns is not None and turn.steal_ns > max(CLOCK_TICK_NS, STEAL_SHARE * turn.wall_ns * n_threads)
