"""Asks base's and head's workers, one or both at once, and keeps them on equal terms.

Where the cores are too few for the threads of both, a side begins only when the other rests: threads that wait for work
spin for some milliseconds before they sleep.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from bench.ab.record import NAMES, SideName
from bench.case import HOST_DEVICES, Case
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
        self._let_rest(NAMES[1 - NAMES.index(name)])
        return self._ask(name, request, timeout_s)

    def _ask(self, name: SideName, request: Request, timeout_s: float) -> Answer:
        worker = self.workers[name]
        began, before_ns = time.monotonic(), affinity.waited_ns(worker.pid)
        try:
            reply = worker.ask(request, timeout_s)
        except WorkerFailed as failure:
            raise SideFailed({name: (failure.status, failure.error)}) from failure
        after_ns = affinity.waited_ns(worker.pid)
        waited_ns = None if before_ns is None or after_ns is None else after_ns - before_ns
        return Answer(reply, time.monotonic() - began, waited_ns)

    def ask_at_once(self, request: Request, timeout_s: float) -> dict[SideName, Reply]:
        """Ask both sides and wait for both replies."""
        for worker in self.workers.values():
            worker.send(request)
        replies: dict[SideName, Reply] = {}
        failures: dict[SideName, tuple[str, str]] = {}
        for name in self.order:
            try:
                replies[name] = self.workers[name].receive(timeout_s)
            except WorkerFailed as failure:
                failures[name] = failure.status, failure.error
        if failures:
            raise SideFailed(failures)
        return replies

    def ask_in_turn(self, request: Request, timeout_s: float) -> dict[SideName, Reply]:
        """Ask each side while the other rests."""
        replies: dict[SideName, Reply] = {}
        failures: dict[SideName, tuple[str, str]] = {}
        for name in self.order:
            ask = self._ask if failures else self.ask  # the process of one that failed may be gone
            try:
                replies[name] = ask(name, request, timeout_s).reply
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
        with self._alive("base"):
            cores = sorted(affinity.common(self.workers["base"].pid))
        return cores if len(cores) > 1 and case.n_threads == 1 and case.device in HOST_DEVICES else []

    def give(self, cores: Collection[int]) -> None:
        """Let both sides use `cores` alone.

        Raises:
            DataError: the system does not allow it.
        """
        for name, worker in self.workers.items():
            with self._alive(name):
                try:
                    affinity.give(worker.pid, cores)
                except FileNotFoundError:
                    raise
                except OSError as error:
                    raise DataError(f"{name}'s worker cannot be given cores: {error.strerror}") from error

    def check_equal_terms(self) -> None:
        """Check that both sides may use the same cores at the same priority.

        Raises:
            DataError: they may not.
        """
        terms: dict[SideName, str] = {}
        for name, worker in self.workers.items():
            with self._alive(name):
                terms[name] = affinity.terms(worker.pid)
        if terms["base"] != terms["head"]:
            raise DataError(f"base's worker may use {terms['base']}, head's {terms['head']}: not comparable")

    def _let_rest(self, name: SideName) -> None:
        """Wait until the threads of a side sleep, where they would be in the other's way."""
        if not self.crowded:
            return
        with self._alive(name):
            if not affinity.wait_for_rest(self.workers[name].pid):
                raise DataError(
                    f"{name}'s worker computes while it waits (as with OMP_WAIT_POLICY=active), and there are not "
                    "enough cores for both: not comparable; use fewer --threads"
                )

    @contextmanager
    def _alive(self, name: SideName) -> Iterator[None]:
        """Turn a worker that has vanished into a failure: the out-of-memory killer also chooses sleeping processes."""
        try:
            yield
        except FileNotFoundError as error:
            failure = self.workers[name].death()
            raise SideFailed({name: (failure.status, failure.error)}) from error
