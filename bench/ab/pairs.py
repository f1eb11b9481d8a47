"""Measures process pairs: holds the fork servers of both sides, and takes every case through one pair."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from bench.ab.both import SideFailed
from bench.ab.pair import Manner, Pair, load_request
from bench.ab.record import PairFailure, PairTimes, Side, SideName
from bench.ab.sides import SideServer
from bench.case import Case, Group
from bench.errors import DataError
from bench.judge.sequential import PAIRS_A_PROMPT, SCREENING_PAIRS
from bench.machine.places import temporary_folder
from bench.measure.worker_process import WorkerFailed, WorkerProcess
from bench.measure.workers import LOAD_TIMEOUT_S
from bench.naming import Name
from bench.protocol import Introduction, Load, Loaded, MakeReference
from bench.store.checked_lines import Appender
from kvcache.strategies.catalogue import COMPILING

ServerKey = tuple[str, int]
"""Model and number of threads: a fork server is set up for one of each."""

Introductions = dict[tuple[SideName, str, int], Introduction]
"""The introduction of the fork server of each side, model and number of threads."""

Records = list[PairTimes | PairFailure]

RENEW_AFTER = 4
"""A fifth of the time goes into fresh imports."""

SEED_STEP = 1_000_003
"""Between the seeds of two prompts of a case."""


class ForkServers:
    """The fork servers of both sides, replaced by fresh ones from time to time.

    The forks of one server share its addresses, so what these do to a time must be drawn again, too.
    """

    def __init__(self, sides: tuple[Side, Side], keys: Sequence[ServerKey]) -> None:
        self.sides, self.keys = sides, keys

    def __enter__(self) -> ForkServers:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __getitem__(self, case: Case) -> list[SideServer]:
        """Return base's and head's, for a case."""
        return self._fork_servers[server_key(case)]

    def wait(self) -> Introductions:
        """Wait until all of them can fork; return the introduction of each. Raises as `SideServer.wait`."""
        introductions = {
            (server.side.name, *key): server.wait() for key, pair in self._fork_servers.items() for server in pair
        }
        self._ready = time.monotonic()
        return introductions

    def renew(self, *, at_once: bool) -> bool:
        """Replace them, `at_once` or if they have been used for `RENEW_AFTER` times as long as they took to start."""
        if not at_once and time.monotonic() - self._ready < RENEW_AFTER * (self._ready - self._started):
            return False
        self._stack.close()
        self._start()
        self.wait()
        return True

    def _start(self) -> None:
        self._started = time.monotonic()
        with ExitStack() as stack:
            self._fork_servers = {
                key: [stack.enter_context(SideServer(side, *key)) for side in self.sides] for key in self.keys
            }
            self._stack = stack.pop_all()


class PairMeasurer:
    """Measures process pairs: a fresh process of each side per pair and strategy; a third makes the references."""

    def __init__(
        self,
        fork_servers: ForkServers,
        weights_seed: int,
        timeout_s: float,
        appender: Appender,
        say: Callable[[str], None],
        name: Name,
        kernels: dict[str, str] | None = None,
    ) -> None:
        """`say` prints progress with the `name` of a case. `kernels` pins both sides; None: to head's choice."""
        self.fork_servers, self.weights_seed, self.timeout_s = fork_servers, weights_seed, timeout_s
        self.appender, self.say, self.name = appender, say, name
        self.kernels = kernels
        self.chosen: dict[tuple[Group, str, tuple[int, ...]], dict[str, str]] = {}
        """What head's code chose, by group, strategy and batch sizes."""
        self.said: set[tuple[Group, str]] = set()
        """Groups and strategies whose sides have different kernels, which was said."""
        self.references: dict[Group, WorkerProcess] = {}
        self.made: dict[Case, Path] = {}
        self.manners: dict[str, Manner] = {}

    def __enter__(self) -> PairMeasurer:
        self._stack = ExitStack()
        self._scratch = self._stack.enter_context(temporary_folder())
        return self

    def __exit__(self, *_: object) -> None:
        self._end_references()
        self._stack.close()

    def get_ready(self, number: int) -> None:
        """Replace the fork servers, where it is time before pair `number`."""
        if self.fork_servers.renew(at_once=number == SCREENING_PAIRS):  # one layout of addresses proves no change
            self._end_references()  # they were forks of the old ones

    def measure(self, number: int, cases: Sequence[Case]) -> Records:
        """Measure one pair of every one of `cases`; each is stored at once, so that an interruption keeps it."""
        records: Records = []
        for members in _by_worker(cases):
            for record in self._measure_workers(number, members):
                records.append(record)
                self.appender.append(record)
        if (number + 1) % PAIRS_A_PROMPT == 0:
            for path in self.made.values():
                path.unlink()
            self.made.clear()
        return records

    def _measure_workers(self, number: int, cases: Sequence[Case]) -> Iterator[PairTimes | PairFailure]:
        """Measure cases of one group and strategy in one pair of processes."""
        with ExitStack() as stack:
            pair: Pair | None = None
            for case in cases:
                seed = (case.seed + SEED_STEP * (number // PAIRS_A_PROMPT)) % 2**63
                fresh = msgspec.structs.replace(case, seed=seed)
                try:
                    reference = self._reference(fresh)
                    if pair is None:
                        pair = Pair(number, *self._fork(stack, case), self.timeout_s, self.manners)
                        self._say_others(case, pair.load(case, self._kernels(cases), _batch_sizes(cases)))
                    yield pair.measure(case.key, fresh, reference)
                except (SideFailed, DataError) as error:
                    for side, (status, reason) in _failures(error).items():
                        self.say(f"{status} ({side}): {self.name(case)}: {reason}")
                        yield PairFailure(case=case.key, pair=number, side=side, status=status, error=reason)
                    stack.close()  # whatever state they are in, the next case gets new ones
                    pair = None

    def _kernels(self, cases: Sequence[Case]) -> dict[str, str] | None:
        """Find what both sides of these cases, of one group and strategy, are pinned to; None where head has no choice.

        Head's code looks once, in a process of its own. Sides of different environments have a choice each: what one
        has may not run in the other.
        """
        case = cases[0]
        environments = [(server.side.python, server.side.variables) for server in self.fork_servers[case]]
        if self.kernels is not None or case.strategy not in COMPILING or environments[0] != environments[1]:
            return self.kernels
        batch_sizes = _batch_sizes(cases)
        key = case.group, case.strategy, tuple(batch_sizes)
        if key not in self.chosen:
            try:
                with self.fork_servers[case][1].fork() as worker:
                    loaded = worker.ask(load_request(case, kernels_for=batch_sizes), LOAD_TIMEOUT_S)
            except WorkerFailed as failure:
                raise SideFailed({"head": (failure.status, failure.error)}) from failure
            self.chosen[key] = loaded.kernels if isinstance(loaded, Loaded) else {}
        return self.chosen[key] or None

    def _say_others(self, case: Case, others: str) -> None:
        """Say once of a group and strategy which kernels base does not share with head, so that its times differ."""
        if others and (case.group, case.strategy) not in self.said:
            self.said.add((case.group, case.strategy))
            self.say(f"{case.strategy}: base does not compute by head's kernels ({others}); that is part of its times")

    def _fork(self, stack: ExitStack, case: Case) -> tuple[WorkerProcess, WorkerProcess]:
        """Fork a fresh worker of base and one of head, which `stack` ends."""
        workers: list[WorkerProcess] = []
        failures: dict[SideName, tuple[str, str]] = {}
        for fork_server in self.fork_servers[case]:
            try:
                workers.append(stack.enter_context(fork_server.fork()))
            except WorkerFailed as failure:
                failures[fork_server.side.name] = failure.status, failure.error
        if failures:
            raise SideFailed(failures)
        base, head = workers
        return base, head

    def _reference(self, case: Case) -> Path:
        """Find what naive re-feed emits for `case`: made by base's code, once per cell and prompt."""
        if case.cell not in self.made:
            path = self._scratch / f"{len(self.made)}.safetensors"
            try:
                self._reference_worker(case).ask(MakeReference(case=case, path=str(path)), self.timeout_s)
            except WorkerFailed as failure:
                if case.group in self.references:
                    self.references.pop(case.group).close()
                raise SideFailed({"base": (failure.status, f"the reference failed: {failure.error}")}) from failure
            self.made[case.cell] = path
        return self.made[case.cell]

    def _reference_worker(self, case: Case) -> WorkerProcess:
        group = case.group
        if group not in self.references:
            self.references[group] = self.fork_servers[case][0].fork()
            load = Load(group=group, strategy="", naive_logits="last", seed=self.weights_seed)
            self.references[group].ask(load, LOAD_TIMEOUT_S)
        return self.references[group]

    def _end_references(self) -> None:
        while self.references:
            self.references.popitem()[1].close()


def _failures(error: SideFailed | DataError) -> Mapping[SideName, tuple[str, str]]:
    """Name whose failures they are. Sides that are not comparable are no fault of head's, whose failures are judged."""
    return error.failures if isinstance(error, SideFailed) else {"base": ("not comparable", str(error))}


def _batch_sizes(cases: Sequence[Case]) -> list[int]:
    return sorted({case.batch_size for case in cases})


def server_key(case: Case) -> ServerKey:
    """Return which fork servers the workers of `case` come from."""
    return case.model, case.n_threads


def _by_worker(cases: Sequence[Case]) -> list[list[Case]]:
    """Group the cases by what one pair of processes measures: one group, strategy and variant."""
    members: dict[tuple[Group, str, str], list[Case]] = {}
    for case in cases:
        members.setdefault((case.group, case.strategy, case.naive_logits), []).append(case)
    return list(members.values())
