"""The driver's end of a peer's process: start it, ask it, and end it."""

from __future__ import annotations

import subprocess
import tempfile
import threading

import msgspec
import psutil

from bench.measure.server_process import TREE
from tests.studies.peer_engines import python_of
from tests.studies.peer_protocol import Failure, Generated, Loaded, Reply, Request

TIMEOUT_S = 600.0


class PeerFailed(Exception):
    """An engine cannot do what it was asked for; the message says why."""


class Peer:
    """A process of the engine's own Python. Use as a context manager: leaving it ends the process.

    Raises:
        ImportError: the engine is not installed.
    """

    def __init__(self, engine: str, environment: dict[str, str]) -> None:
        python = python_of(engine)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
        self._process = subprocess.Popen(
            [python, "-m", "tests.studies.peer_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=TREE,
            env=environment,
        )
        self._usage = psutil.Process(self._process.pid)

    def cpu_ns(self) -> int:
        """Return the CPU time that the process has used so far."""
        times = self._usage.cpu_times()
        return int((times.user + times.system) * 1e9)

    def ask(self, request: Request) -> Loaded | Generated:
        """Return the answer to `request`; raises PeerFailed where there is none within TIMEOUT_S."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        limit = threading.Timer(TIMEOUT_S, self._process.kill)
        limit.start()
        try:
            self._process.stdin.write(msgspec.json.encode(request) + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        finally:
            limit.cancel()
        if not line:
            self._errors.seek(0)
            last = self._errors.read().decode(errors="replace").strip().splitlines()[-1:]
            raise PeerFailed(
                f"its process ended with exit code {self._process.wait()}{''.join(f': {x}' for x in last)}"
            )
        reply: Reply = msgspec.json.decode(line, type=Reply)
        if isinstance(reply, Failure):
            raise PeerFailed(reply.error)
        return reply

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._errors.close()
