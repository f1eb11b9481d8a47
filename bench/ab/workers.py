"""The two sides of an A/B: an interpreter, an environment and a tree each, and fresh workers of it for every pair."""

from __future__ import annotations

import selectors
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import msgspec
import psutil

from bench import fork_server
from bench.ab.record import Introduction, Side
from bench.errors import DataError, UsageError
from bench.measure.worker_process import TREE, WorkerFailed, WorkerProcess, worker_environment
from bench.protocol import VERSION

START_TIMEOUT_S = 300.0
"""For importing torch and transformers, on a cold disk."""


class ForkServer:
    """A process of one side that has imported everything for a model, and forks workers. Use as a context manager."""

    def __init__(self, side: Side, model: str, n_threads: int) -> None:
        """Start importing; `wait` for the end of it."""
        self.side, self.model = side, model
        self._stack = ExitStack()
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="kvbench-ab-")))
        self._socket = str(folder / "fork_server")
        self._errors = folder / "errors"
        trees = [Path(path) for path in (side.tree, side.folder) if path is not None]
        if not side.has_worker:
            # Links to the driver's two packages, not the folder they lie in: as a site-packages it would give another
            # interpreter this one's torch.
            for package in ("bench", "kvcache"):
                (folder / package).symlink_to(TREE / package)
            trees.append(folder)
        try:
            with self._errors.open("wb") as errors:
                self._process = subprocess.Popen(
                    [side.python, "-P", fork_server.__file__, self._socket, model],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    cwd=side.folder,
                    env=worker_environment(n_threads, trees) | side.variables,
                    start_new_session=True,  # Ctrl-C reaches the driver alone
                )
        except OSError as error:
            self._stack.close()
            raise UsageError(f"--{side.name}-python {side.python}: {error.strerror}") from error

    def wait(self) -> Introduction:
        """Wait until it can fork, and check that it is whom it should be.

        Raises:
            DataError: it does not start, has no worker protocol or another, or imported another tree's code.
            UsageError: the model cannot be had.
        """
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(START_TIMEOUT_S):
                raise DataError(f"{self.side.name} ({self.side.label}) did not start within {START_TIMEOUT_S:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise DataError(
                f"{self.side.name} ({self.side.label}) has no worker that starts: {last_line(self._errors)}"
            )
        found = msgspec.json.decode(line, type=Introduction)
        self._trust(found)
        if found.refused is not None:
            raise UsageError(f"--model {self.model}: {found.refused}")
        return found

    def fork(self) -> ForkedWorker:
        """A fresh worker.

        Raises:
            WorkerFailed: the fork_server is gone.
        """
        return ForkedWorker(self._socket, self._errors)

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # its forks die with it
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._stack.close()

    def _trust(self, found: Introduction) -> None:
        side, who = self.side, f"{self.side.name} ({self.side.label})"
        if found.version != VERSION:
            raise DataError(f"{who} speaks worker protocol {found.version}, this kvbench {VERSION}: not comparable")
        own = Path(side.tree).resolve() if side.tree is not None else None
        expected = own if own is not None and side.has_worker else TREE
        if Path(found.code) != expected:
            raise DataError(f"{who} imported its code from {found.code}, not from {expected}: not comparable")
        if self.model.startswith("py:") and own is not None and not side.has_worker and not _lies_in(found, own):
            raise DataError(
                f"{who} imported {self.model} from {found.model_code}, not from its checkout: not comparable"
            )


def _lies_in(found: Introduction, tree: Path) -> bool:
    """Whether the user's model is the checkout's own."""
    return found.model_code is not None and Path(found.model_code).is_relative_to(tree)


class ForkedWorker(WorkerProcess):
    """A worker forked by a fork_server, spoken to over a socket; closing it ends it."""

    def __init__(self, path: str, errors: Path) -> None:
        self._error_file, self._buffer = errors, b""
        self._connection = socket.socket(socket.AF_UNIX)
        try:
            self._connection.connect(path)
            self._requests = self._connection.makefile("wb")
            self._replies = self._connection.makefile("rb")  # read by its descriptor, so nothing stays in a buffer
            self.pid = msgspec.json.decode(self._read_line(time.monotonic() + START_TIMEOUT_S))["pid"]
            self._usage = psutil.Process(self.pid)
        except (OSError, EOFError, psutil.NoSuchProcess):
            self._connection.close()
            raise self.death() from None

    def death(self) -> WorkerFailed:
        return WorkerFailed("failed", f"the worker ended: {last_line(self._error_file)}", alive=False)

    @property
    def alive(self) -> bool:
        return bool(self._usage.is_running())

    def close(self) -> None:
        with suppress(psutil.NoSuchProcess):  # it compares start times: the id may be another process's by now
            self._usage.kill()
        with suppress(BrokenPipeError):  # bytes that it never took
            self._requests.close()
        self._replies.close()
        self._connection.close()


def last_line(errors: Path) -> str:
    """The last thing that a process said on standard error."""
    lines = errors.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"
