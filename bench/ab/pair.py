"""Measures one pair of fresh processes, base and head: checks both, warms both up, and times them in turns.

Short steps: whole turns in blocks A A B B, B B A A, ...; A B B A if there is one block only, A B if a turn is long.
Long steps: both take a turn at once, in lockstep, a step of one and then the same step of the other, so that a moment
in which the machine is slow affects both. Which side is A changes from pair to pair, so that a drift cancels. Sides of
one thread share one core in a block, and the next core in the next: a core that another program uses then disturbs both
sides alike, and never a whole pair.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from bench.ab.both import Answer, BothSides, SideFailed
from bench.ab.record import NAMES, PairTimes, SideName, Turn
from bench.case import Case
from bench.errors import DataError
from bench.measure.worker_process import WorkerProcess
from bench.measure.workers import LOAD_TIMEOUT_S
from bench.protocol import CheckCase, Checked, GoOn, Load, Loaded, Paused, TakeTurn, TurnTaken
from kvcache.strategies.catalogue import is_lossy

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

LEAST_LOCKSTEP_BLOCKS = 2
"""Of one turn of each side: so that either side is first in one."""


class Manner(NamedTuple):
    """How a case is measured: decided in its first pair, and the same in all."""

    lockstep: bool
    warm_up: bool
    """Whether the check is not warm-up enough."""
    turn_s: float
    """How long a turn took there."""


class Pair:
    """Both sides' workers of one strategy."""

    def __init__(
        self, number: int, base: WorkerProcess, head: WorkerProcess, timeout_s: float, manners: dict[str, Manner]
    ) -> None:
        """`manners` has those of the cases of earlier pairs, by key, and gets those of this one."""
        self.number, self.timeout_s, self.manners = number, timeout_s, manners
        self.both = BothSides(base, head, sides_of(number))
        self.kernels: dict[str, str] | None = None
        self.lockstep = False
        """Whether both revisions know turns in lockstep, as they say when they have loaded the model."""

    def load(self, case: Case, kernels: dict[str, str] | None = None, batch_sizes: Sequence[int] = ()) -> str:
        """Have both load the model, side by side, and use these kernels; an older revision has its own.

        Return the first product that base computes by another one than head at these batch sizes; empty for none.
        """
        self.kernels = kernels
        request = load_request(case, kernels, () if kernels is None else batch_sizes)
        replies = self.both.ask_both(request, LOAD_TIMEOUT_S, at_once=True)
        self.lockstep = all(isinstance(reply, Loaded) and reply.lockstep for reply in replies.values())
        loaded = [name for name, reply in replies.items() if isinstance(reply, Loaded) and reply.prefill_quantized]
        if case.prefill_quantized and len(loaded) < len(replies):
            reason = ("unsupported", "this revision does not support --prefill-quantized")
            raise SideFailed({name: reason for name in replies if name not in loaded})
        base, head = (getattr(replies[name], "kernels", {}) for name in NAMES)
        others = (product for product in head if base.get(product) != head[product])
        return next((f"{product}: {base.get(product, 'not known')}, head {head[product]}" for product in others), "")

    def measure(self, key: str, case: Case, reference: Path) -> PairTimes:
        """Check both, warm both up, and time them. `case` has the seed of its prompt, `key` names it over all pairs.

        Raises:
            SideFailed: a side crashed, or emitted other tokens.
            DataError: the sides cannot be compared: they may not use the same cores, time other steps, or compute while
                they wait.
        """
        self.both.expect(case)
        self.both.check_equal_terms()
        turn_s, lockstep = self._get_ready(key, case, reference)
        turns_a_block, least = (2, LEAST_LOCKSTEP_BLOCKS) if lockstep else (4, 1)
        blocks = max(least, min(MOST_BLOCKS, round(PAIR_S / (turns_a_block * turn_s))))
        self.both.check_equal_terms()
        cores = self.both.cores_to_share(case) if blocks > 1 else []
        taken: list[tuple[Turn, list[int]]] = []
        for block in range(blocks):
            if cores:
                # Two consecutive pairs, which differ in who is first, have the same cores.
                self.both.give({cores[(self.number // 2 + block) % len(cores)]})
            if lockstep:
                taken += self._turns_in_lockstep(block)
            else:
                order = turn_order(self.number, block, blocks) if turn_s <= LONG_TURN_S else sides_of(self.number)
                taken += [self._turn(name, block) for name in order]
            self.both.check_equal_terms()
        if cores:
            self.both.give(cores)
        if len({tuple(steps) for _, steps in taken}) > 1:
            raise DataError("base and head time different decode steps: not comparable")
        return PairTimes(
            case=key, pair=self.number, turns=[turn for turn, _ in taken], lockstep=lockstep, kernels=self.kernels
        )

    def _get_ready(self, key: str, case: Case, reference: Path) -> tuple[float, bool]:
        """Check both and warm both up; return how many seconds a turn takes, and whether to take turns in lockstep."""
        compiled, known = self._check(case, reference), self.manners.get(key)
        if known and not known.warm_up and not compiled:
            return known.turn_s, known.lockstep
        warmest = self._warm_up()
        turn_s = warmest.wall_ns / 1e9
        if known is None:
            steps_ns = warmest.step_ns or [warmest.prefill_ns]
            step_s = sum(steps_ns) / len(steps_ns) / 1e9
            # Off Linux there is no way to see when a side rests.
            may = self.lockstep and case.on_host and sys.platform == "linux"
            lockstep = may and step_s >= LOCKSTEP_FROM_S
            warm_up = not lockstep or step_s < CHECK_IS_WARM_UP_FROM_S
            known = self.manners[key] = Manner(lockstep, warm_up, turn_s)
        return turn_s, known.lockstep

    def _check(self, case: Case, reference: Path) -> bool:
        """Have both prove their tokens; return whether one compiled on the way."""
        request = CheckCase(case=case, path=str(reference), count=False)
        # With more threads than cores, threads that wait for one another at a product's end spin on cores that the
        # others need.
        replies = self.both.ask_both(request, self.timeout_s, at_once=not self.both.crowded)
        checks = {name: reply for name, reply in replies.items() if isinstance(reply, Checked)}
        wrong = [
            name for name, check in checks.items() if check.tokens_match == "false" and not is_lossy(case.strategy)
        ]
        if wrong:
            raise SideFailed(dict.fromkeys(wrong, ("failed", "emitted other tokens than naive re-feed")))
        return any(check.compile_s is not None for check in checks.values())

    def _warm_up(self) -> Turn:
        """Take two turns of each, or one if it is long; return the slower side's shorter one."""
        first, second = sides_of(self.number)
        turns = [self._turn(name, -1)[0] for name in (first, second)]
        if min(turn.wall_ns for turn in turns) <= LONG_TURN_S * 1e9:
            # The last one is the first side's, so that its first timed one follows its own as in later blocks.
            turns += [self._turn(name, -1)[0] for name in (second, first)]
        # Each side's shorter one: where the machine is slow for a moment, it takes more turns, not fewer.
        own = [min((turn for turn in turns if turn.side == name), key=lambda turn: turn.wall_ns) for name in NAMES]
        return max(own, key=lambda turn: turn.wall_ns)

    def _turn(self, name: SideName, block: int) -> tuple[Turn, list[int]]:
        """Take a turn of one side; return it and which steps it timed."""
        answer = self.both.ask(name, TakeTurn(), self.timeout_s)
        taken = answer.reply
        assert isinstance(taken, TurnTaken)
        return _turn_of(name, block, taken, taken.total_ns, [answer]), taken.steps

    def _turns_in_lockstep(self, block: int) -> list[tuple[Turn, list[int]]]:
        """Take a turn of each side; return each and which steps it timed. Who is first changes with every block."""
        answers: dict[SideName, list[Answer]] = {name: [] for name in sides_of(self.number + block)}
        under_way, began_ns = list(answers), time.monotonic_ns()
        while under_way:
            for name in list(under_way):
                own = answers[name]
                request = GoOn() if own else TakeTurn(lockstep=True)
                left_s = max(0.0, self.timeout_s - sum(answer.seconds for answer in own))
                own.append(self.both.ask(name, request, left_s))
                if not isinstance(own[-1].reply, Paused):
                    under_way.remove(name)
        wall_ns = time.monotonic_ns() - began_ns
        turns = []
        for name in NAMES:
            own = answers[name]
            taken = own[-1].reply
            assert isinstance(taken, TurnTaken)
            turn = _turn_of(name, block, taken, wall_ns, own)
            turns.append((msgspec.structs.replace(turn, prefill_waited_ns=own[0].waited_ns), taken.steps))
        return turns


def load_request(case: Case, kernels: dict[str, str] | None = None, kernels_for: Sequence[int] = ()) -> Load:
    """Make the request to load what `case` runs, pinned to these kernels, or to choose some."""
    return Load(
        group=case.group,
        strategy=case.strategy,
        naive_logits=case.naive_logits,
        seed=case.seed,
        prefill_quantized=case.prefill_quantized,
        kernels=kernels,
        kernels_for=list(kernels_for),
    )


def sides_of(number: int) -> tuple[SideName, SideName]:
    """Return the first and the second side of pair `number`."""
    return NAMES if number % 2 == 0 else (NAMES[1], NAMES[0])


def turn_order(number: int, block: int, blocks: int) -> list[SideName]:
    """Return whose turn is first to fourth in a block of pair `number`.

    Of several blocks, each side has two turns in a row, the second of which finds the core's caches as it left them.
    """
    first, second = sides_of(number)
    if blocks == 1:
        return [first, second, second, first]
    order = [first, first, second, second]
    return order if block % 2 == 0 else order[::-1]


def _turn_of(name: SideName, block: int, taken: TurnTaken, wall_ns: int, answers: Sequence[Answer]) -> Turn:
    """Keep what is stored of a turn, which `answers` made up."""
    prefill_ns, step_ns = taken.device_ns
    waits_ns = [answer.waited_ns for answer in answers]
    return Turn(
        side=name,
        block=block,
        prefill_ns=prefill_ns,
        step_ns=step_ns,
        wall_ns=wall_ns,
        waited_ns=None if None in waits_ns else sum(filter(None, waits_ns)),
        steal_ns=taken.covariates.steal_ns,
        throttled_ns=taken.covariates.throttled_ns,
    )
