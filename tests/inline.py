"""`kvbench run` with workers in this process: the same `Worker`, asked by a call in place of a socket.

A fork server imports torch and transformers, which takes as long as all that most tests do with it. What is a worker's
process itself (its death, its threads, its memory) is tested with real ones: tests/measure, and the run that
tests/commands share.
"""

from __future__ import annotations

import gc
import os
from unittest.mock import Mock

import msgspec
import pytest

from bench import worker
from bench.measure import server_process
from bench.measure.worker_process import WorkerFailed
from bench.protocol import Refused, Reply, Request
from bench.worker import Worker


class InlineWorker:
    """Has the interface of `WorkerProcess`. Every message is encoded and decoded, as on its way to a process."""

    def __init__(self) -> None:
        self.pid, self.alive = os.getpid(), True
        self._worker = Worker()
        self._requests: list[bytes] = []

    @property
    def cpu_ns(self) -> int:
        """CPU time of this process while it waits for its turn: none."""
        return 0

    def ask(self, request: Request, timeout_s: float) -> Reply:
        self.send(request)
        return self.receive(timeout_s)

    def send(self, request: Request) -> None:
        self._requests.append(msgspec.json.encode(request))

    def receive(self, timeout_s: float) -> Reply:
        answer = self._worker.answer(msgspec.json.decode(self._requests.pop(0), type=Request))
        reply: Reply = msgspec.json.decode(msgspec.json.encode(answer), type=Reply)
        if isinstance(reply, Refused):
            self.alive = not reply.ends
            raise WorkerFailed(
                reply.status, reply.error, alive=self.alive, tokens_match=reply.tokens_match, of_model=reply.of_model
            )
        return reply

    def close(self) -> None:
        self.alive = False

    def __enter__(self) -> InlineWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class InlineServers:
    """Has the interface of `RunServers`."""

    def start(self, model: str, n_threads: int, process: int = 0) -> None:
        """There is nothing to import."""

    def fork(self, model: str, n_threads: int, process: int = 0) -> InlineWorker:
        return InlineWorker()

    def close(self) -> None:
        """There is nothing to end."""

    def __enter__(self) -> InlineServers:
        return self

    def __exit__(self, *_: object) -> None:
        """There is nothing to end."""


def use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the commands of this process use inline workers."""
    monkeypatch.setattr(server_process, "RunServers", InlineServers)
    monkeypatch.setattr(worker, "gc", Mock(spec=gc))  # its own process would collect no more garbage
