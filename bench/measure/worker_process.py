"""The driver's end of a worker: start it, ask it, give up on it."""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Literal

import msgspec
import psutil

from bench.case import Group
from bench.protocol import Refused, Reply, Request
from bench.record import TokensMatch

TREE = Path(__file__).resolve().parents[2]
"""The folder of this very code, which a worker imports from too."""

_START = "import gc; gc.disable(); from bench.worker import main; gc.enable(); main()"
"""Collecting garbage while torch and transformers are imported makes that take a quarter longer."""

_decode_reply = msgspec.json.Decoder(Reply).decode


class WorkerFailed(Exception):
    """A request was not carried out; `status` and the message say why. `alive` is False where the worker is gone."""

    def __init__(
        self,
        status: Literal["failed", "oom", "timeout", "unsupported"],
        error: str,
        *,
        alive: bool,
        tokens_match: TokensMatch | None = None,
    ) -> None:
        super().__init__(error)
        self.status, self.error, self.alive, self.tokens_match = status, error, alive, tokens_match


class WorkerProcess:
    """A worker process; one request at a time. Use as a context manager: leaving it ends the process."""

    def __init__(self, group: Group) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the worker
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=worker_environment(group.n_threads),
            start_new_session=True,  # Ctrl-C reaches the driver alone, which then ends its workers
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests: IO[bytes] = self._process.stdin
        self._replies: IO[bytes] = self._process.stdout
        self._buffer = b""
        self.pid = self._process.pid
        self._usage = psutil.Process(self.pid)

    def ask(self, request: Request, timeout_s: float) -> Reply:
        """Send `request` and wait for the answer.

        Raises:
            WorkerFailed: the worker refused, crashed, was killed, or did not answer within `timeout_s` seconds (it is
                killed then).
        """
        self.send(request)
        return self.receive(timeout_s)

    def send(self, request: Request) -> None:
        """Send `request`; `receive` fetches the answer. In between another arm can be asked: both work at once."""
        with suppress(BrokenPipeError):  # the worker is gone: `receive` finds that out and says why
            self._requests.write(msgspec.json.encode(request) + b"\n")
            self._requests.flush()

    def receive(self, timeout_s: float) -> Reply:
        """The answer to what was sent; raises as `ask`."""
        try:
            line = self._read_line(time.monotonic() + timeout_s)
        except TimeoutError:
            self.close()
            raise WorkerFailed(
                "timeout", f"no answer within the {timeout_s:.0f} s that --timeout left it", alive=False
            ) from None
        except (ConnectionError, EOFError):
            raise self.death() from None
        reply: Reply = _decode_reply(line)
        if isinstance(reply, Refused):
            raise WorkerFailed(reply.status, reply.error, alive=True, tokens_match=reply.tokens_match)
        return reply

    @property
    def cpu_ns(self) -> int:
        """CPU time that the worker has used so far; 0 when it is gone."""
        try:
            times = self._usage.cpu_times()
        except psutil.NoSuchProcess:
            return 0
        return int((times.user + times.system) * 1e9)

    def death(self) -> WorkerFailed:
        """Why the worker, which is gone, ended."""
        code = self._process.wait()
        self._errors.seek(0)
        last = self._errors.read().decode(errors="replace").strip().splitlines()[-1:]
        if code == -9:  # nobody but the system's out-of-memory killer sends this to a worker that was not given up on
            return WorkerFailed("oom", "the worker was killed (signal 9): most likely out of memory", alive=False)
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return WorkerFailed("failed", f"the worker {how}{''.join(f': {line}' for line in last)}", alive=False)

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the process at once; it holds nothing that is not stored already."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:  # bytes that the dead process never took
                    continue

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_line(self, deadline: float) -> bytes:
        with selectors.DefaultSelector() as selector:
            selector.register(self._replies, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                received = os.read(self._replies.fileno(), 1 << 16)
                if not received:
                    raise EOFError
                self._buffer += received
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line


def worker_environment(n_threads: int, trees: Sequence[Path] = (TREE,)) -> dict[str, str]:
    """The environment variables of every worker with so many threads: equal for every arm, and its own trees first."""
    threads = str(n_threads)
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([*map(str, trees), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        # Freed activations stay with the process: without this, glibc returns and faults in the pages of every large
        # temporary again and again (prefill of 512 tokens: 0.86 s against 0.77 s).
        "MALLOC_MMAP_THRESHOLD_": str(1 << 25),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    }
