"""Asks base's and head's workers, one or both at once, and keeps them on equal terms.

Where the cores are too few for the threads of both, a side begins only when the other rests: threads that wait for work
spin for some milliseconds before they sleep.
"""

import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from bench.ab.record import NAMES, SideName
from bench.case import Case
from bench.errors import DataError
from bench.machine import affinity
from bench.machine.affinity import usable_cores
from bench.measure.worker_process import WorkerFailed, WorkerProcess
from bench.protocol import Reply, Request


class Answer(NamedTuple):
    """One worker's answer to one request."""

    reply: Reply
    seconds: float
    waited_ns: int | None
    """Time that its threads waited for a core meanwhile (Linux)."""


class SideFailed(Exception):
    """One or both of the sides' workers did not do what they were asked: the status and the error of each such side."""

    def __init__(self, failures: Mapping[SideName, tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{side} {status}: {error}" for side, (status, error) in failures.items()))
        self.failures = failures


class BothSides:
    """The workers of base and head. Every method raises `SideFailed` where one fails or is gone."""

    def __init__(self, base: WorkerProcess, head: WorkerProcess, order: tuple[SideName, SideName]) -> None:
        """`order` says whose turn is first."""
        self.workers: dict[SideName, WorkerProcess] = {"base": base, "head": head}
        self.order = order
        self.crowded = False

    def expect(self, case: Case) -> None:
        """Note whether the machine has a core for each thread of both workers of `case`."""
        self.crowded = len(NAMES) * case.n_threads > usable_cores()

    def ask(self, name: SideName, request: Request, timeout_s: float) -> Answer:
        """Ask one side, once the other is not in its way, and measure how long it took and waited for a core.

        Raises:
            DataError: the other side's threads go on computing.
        """
        self._let_rest(_other(name))
        worker = self.workers[name]
        began, before_ns = time.monotonic(), affinity.waited_ns(worker.pid)
        try:
            reply = worker.ask(request, timeout_s)
        except WorkerFailed as failure:
            raise SideFailed({name: (failure.status, failure.error)}) from failure
        after_ns = affinity.waited_ns(worker.pid)
        waited_ns = None if before_ns is None or after_ns is None else after_ns - before_ns
        return Answer(reply, time.monotonic() - began, waited_ns)

    def ask_both(self, request: Request, timeout_s: float, *, at_once: bool) -> dict[SideName, Reply]:
        """Ask both sides, side by side or each while the other rests, and wait for both replies."""
        replies: dict[SideName, Reply] = {}
        failures: dict[SideName, tuple[str, str]] = {}
        if at_once:
            for worker in self.workers.values():
                worker.send(request)
        for name in self.order:
            try:
                if not at_once:
                    if not failures:  # the process of one that failed may be gone
                        self._let_rest(_other(name))
                    self.workers[name].send(request)
                replies[name] = self.workers[name].receive(timeout_s)
            except WorkerFailed as failure:
                failures[name] = failure.status, failure.error
            except SideFailed as failed:
                failures |= failed.failures
        if failures:
            raise SideFailed(failures)
        return replies

    def cores_to_share(self, case: Case) -> list[int]:
        """List the cores on which both sides can take turns, one core at a time; empty where that would not be fair.

        Workers of several threads keep all cores: threads of one side that spin while they wait for work would sit on
        the other's core. So do workers on CUDA, whose driver has threads that should not wait for the worker's own.
        """
        with self._alive("base") as pid:
            cores = sorted(affinity.common(pid))
        return cores if len(cores) > 1 and case.n_threads == 1 and case.on_host else []

    def give(self, cores: Collection[int]) -> None:
        """Let both sides use `cores` alone; raises DataError where the system does not allow it."""
        for name in NAMES:
            try:
                with self._alive(name) as pid:
                    affinity.give(pid, cores)
            except OSError as error:
                raise DataError(f"{name}'s worker cannot be given cores: {error.strerror}") from error

    def check_equal_terms(self) -> None:
        """Check that both sides may use the same cores at the same priority; raises DataError where they may not."""
        terms: dict[SideName, str] = {}
        for name in NAMES:
            with self._alive(name) as pid:
                terms[name] = affinity.terms(pid)
        if terms["base"] != terms["head"]:
            raise DataError(f"base's worker may use {terms['base']}, head's {terms['head']}: not comparable")

    def _let_rest(self, name: SideName) -> None:
        """Wait until the threads of a side sleep, where they would be in the other's way."""
        if not self.crowded:
            return
        with self._alive(name) as pid:
            if not affinity.wait_for_rest(pid):
                raise DataError(
                    f"{name}'s worker computes while it waits (as with OMP_WAIT_POLICY=active), and there are not "
                    "enough cores for both: not comparable; use fewer --threads"
                )

    @contextmanager
    def _alive(self, name: SideName) -> Iterator[int]:
        """Yield the process id of a worker; one that has vanished (killed for memory, even asleep) is a failure."""
        try:
            yield self.workers[name].pid
        except FileNotFoundError as error:
            failure = self.workers[name].death()
            raise SideFailed({name: (failure.status, failure.error)}) from error


def _other(name: SideName) -> SideName:
    return NAMES[1 - NAMES.index(name)]
