"""The driver's end of a worker: ask it, wait for its answer, give up on it."""

import os
import selectors
import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import msgspec
import psutil

from bench.protocol import Refused, Reply, Request
from bench.record import FailureStatus, TokensMatch

FORK_TIMEOUT_S = 60.0
"""For a fork, which takes milliseconds on a machine at rest."""
END_TIMEOUT_S = 2.0
"""For a worker to end after its connection did, which takes milliseconds, too, unless it is in the middle of a turn."""

_decode_reply = msgspec.json.Decoder(Reply).decode


class WorkerFailed(Exception):
    """A request was not carried out; `status` and the message say why. `alive` is False where the worker is gone."""

    def __init__(
        self,
        status: FailureStatus,
        error: str,
        *,
        alive: bool,
        tokens_match: TokensMatch | None = None,
        of_model: bool = False,
    ) -> None:
        super().__init__(error)
        self.status, self.error, self.alive, self.tokens_match = status, error, alive, tokens_match
        self.of_model = of_model


class WorkerProcess(AbstractContextManager["WorkerProcess"]):
    """A worker that a fork server made; one request at a time. Use as a context manager: leaving it ends the process.

    Raises:
        WorkerFailed: the fork server is gone, or cannot fork.
    """

    def __init__(self, door: socket.socket, folder: Path, exit_code: Callable[[int], int | None]) -> None:
        """Send a connection through `door` to the fork server, which forks a worker for it.

        What the worker writes to standard error is in `folder`; `exit_code` finds how a process id ended.
        """
        self._folder, self._exit_code, self._buffer = folder, exit_code, bytearray()
        self.pid = 0
        self._connection, theirs = socket.socketpair()
        try:
            with theirs:
                socket.send_fds(door, [b"+"], [theirs.fileno()])
            self.pid = _forked(self._read_line(FORK_TIMEOUT_S))
            self._usage = psutil.Process(self.pid)
        except (OSError, EOFError, psutil.NoSuchProcess) as error:
            self._connection.close()
            if self.pid:
                raise self.death() from None
            late = f"no answer within {FORK_TIMEOUT_S:.0f} s"
            reason = str(error) or (late if isinstance(error, TimeoutError) else "the fork server ended")
            raise WorkerFailed("failed", f"no worker could be forked: {reason}", alive=False) from None

    def ask(self, request: Request, timeout_s: float) -> Reply:
        """Send `request` and wait for the answer.

        Raises:
            WorkerFailed: the worker refused, crashed, was killed, or did not answer within `timeout_s` seconds (it is
                killed then).
        """
        self.send(request)
        return self.receive(timeout_s)

    def send(self, request: Request) -> None:
        """Send `request`; `receive` fetches the answer. In between another worker can be asked: both work at once."""
        with suppress(OSError):  # the worker is gone: `receive` finds that out and says why
            self._connection.sendall(msgspec.json.encode(request) + b"\n")

    def receive(self, timeout_s: float) -> Reply:
        """Wait for the answer to what was sent; raises as `ask`."""
        try:
            line = self._read_line(timeout_s)
        except TimeoutError:
            self._kill()
            raise WorkerFailed("timeout", f"no reply within {timeout_s:.0f} s", alive=False) from None
        except (OSError, EOFError):
            raise self.death() from None
        reply: Reply = _decode_reply(line)
        if isinstance(reply, Refused):
            if reply.ends:
                self._kill()
            raise WorkerFailed(
                reply.status,
                reply.error,
                alive=not reply.ends,
                tokens_match=reply.tokens_match,
                of_model=reply.of_model,
            )
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
        """Return why the worker, which is gone, ended."""
        code = self._exit_code(self.pid)
        if code == -9:  # nobody but the system's out-of-memory killer sends this to a worker that was not given up on
            return WorkerFailed("oom", "the worker was killed (signal 9): most likely out of memory", alive=False)
        if code is None:
            how = "ended"
        else:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        last = last_line(self._folder / f"{self.pid}.errors")
        return WorkerFailed("failed", f"the worker {how}{f': {last}' if last else ''}", alive=False)

    @property
    def alive(self) -> bool:
        """Whether it can be asked: a worker that was killed still runs for a moment, but its connection is closed."""
        return self._connection.fileno() != -1 and bool(self._usage.is_running())

    def close(self) -> None:
        """End the process: one that is busy is killed. All it held is stored already."""
        self._connection.close()
        with suppress(psutil.TimeoutExpired):
            self._usage.wait(END_TIMEOUT_S)
        self._kill()

    def _kill(self) -> None:
        kill_tree(self._usage)
        self._connection.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_line(self, timeout_s: float) -> bytes:
        return read_line(self._connection.fileno(), self._buffer, timeout_s)


def kill_tree(process: psutil.Process, *, below: bool = True) -> None:
    """Kill a process and all `below` it: a compiler would go on, and torch's lock for its build would stay."""
    with suppress(psutil.NoSuchProcess):  # psutil compares start times: the id may be another process's by now
        doomed = [process, *(process.children(recursive=True) if below else ())]
        for one in doomed:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(doomed, timeout=END_TIMEOUT_S)


def _forked(answer: bytes) -> int:
    """Return the process id in a worker's first line; OSError where it is the server's, which could not fork."""
    facts = msgspec.json.decode(answer)
    if "refused" in facts:
        raise OSError(facts["refused"])
    return int(facts["pid"])


def read_line(file: int, buffer: bytearray, timeout_s: float) -> bytes:
    """Read a line within `timeout_s` seconds; what follows it stays in `buffer`.

    Raises:
        TimeoutError: there is none by then.
        EOFError: there will be none.
    """
    deadline = time.monotonic() + timeout_s
    with selectors.DefaultSelector() as selector:
        selector.register(file, selectors.EVENT_READ)
        while b"\n" not in buffer:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise TimeoutError
            received = os.read(file, 1 << 16)
            if not received:
                raise EOFError
            buffer += received
    line, _, rest = bytes(buffer).partition(b"\n")
    buffer[:] = rest
    return line


def last_line(errors: Path) -> str:
    """Return the last line that a process wrote to standard error; empty where it wrote none."""
    with suppress(FileNotFoundError):
        lines = errors.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""
    return ""
