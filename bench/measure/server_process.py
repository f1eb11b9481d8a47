"""The driver's end of a fork server: start it, trust it, have it fork workers, and ask it how one ended."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Self

import msgspec

from bench.errors import DataError, UsageError, blaming
from bench.machine.affinity import unbind, with_threads
from bench.machine.places import temporary_folder
from bench.measure.worker_process import WorkerProcess, last_line, read_line
from bench.protocol import VERSION, Ended, Introduction

TREE = Path(__file__).resolve().parents[2]
"""The folder of this very code, which a worker imports from too."""

PROGRAM = TREE / "bench" / "fork_server.py"

START_TIMEOUT_S = 300.0
"""For importing torch and transformers, on a cold disk."""

EXIT_TIMEOUT_S = 5.0
"""For the news that a worker ended, which comes within milliseconds of it."""


class ForkServer:
    """A process that has imported all that a model needs, and forks workers. Use as a context manager.

    Threads and allocator are set up before torch is imported, so a server is for one number of threads.
    """

    def __init__(
        self,
        model: str,
        n_threads: int,
        *,
        name: str = "the fork server",
        python: str = sys.executable,
        variables: Mapping[str, str] | None = None,
        trees: Sequence[Path] = (TREE,),
        folder: str | None = None,
    ) -> None:
        """Start importing; `wait` for the end of it.

        `model` is "" where no model will be loaded. `trees` are imported from, in that order, and the first one that
        holds this project's code must be what the workers run. `folder` is where they run (default: here).

        Raises:
            OSError: there is no such `python`.
        """
        self.model, self.name = model, name
        self._trees = trees
        self._introduction: Introduction | None = None
        self._ended: dict[int, int] = {}
        self._buffer = bytearray()
        self._stack = ExitStack()
        self._folder = self._stack.enter_context(temporary_folder())
        mine, theirs = socket.socketpair()
        self._door = self._stack.enter_context(mine)
        unbind()  # a server that inherited one core of an import here would have no other
        try:
            with theirs, (self._folder / "errors").open("wb") as errors:
                self._process = subprocess.Popen(
                    [python, "-P", str(PROGRAM), str(theirs.fileno()), str(self._folder), model],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    cwd=folder,
                    env=worker_environment(n_threads, trees) | dict(variables or {}),
                    start_new_session=True,  # Ctrl-C reaches the driver alone
                )
        except OSError:
            self._stack.close()
            raise
        assert self._process.stdout is not None
        self._news = self._process.stdout

    def wait(self) -> Introduction:
        """Wait until it can fork, and check that it is what it should be.

        Raises:
            DataError: it does not start, has no worker protocol or another, or imported another tree's code.
            UsageError: the model is not available.
        """
        if self._introduction is not None:
            return self._introduction
        try:
            line = self._read_line(START_TIMEOUT_S)
        except TimeoutError:
            raise DataError(f"{self.name} did not start within {START_TIMEOUT_S:.0f} s") from None
        except EOFError:
            reason = last_line(self._folder / "errors") or "it printed no error"
            raise DataError(f"{self.name} has no worker that starts: {reason}") from None
        found = msgspec.json.decode(line, type=Introduction)
        if found.version != VERSION:
            raise DataError(
                f"{self.name} speaks worker protocol {found.version}, this kvbench {VERSION}: not comparable"
            )
        expected = next(tree for tree in self._trees if (tree / "bench" / "worker.py").is_file())
        if Path(found.code) != (expected / "bench").resolve().parent:
            raise DataError(f"{self.name} imported its code from {found.code}, not from {expected}: not comparable")
        if found.refused is not None:
            raise UsageError(blaming("--model", self.model, found.refused))
        self._introduction = found
        return found

    def fork(self) -> WorkerProcess:
        """Fork a fresh worker.

        Raises:
            WorkerFailed: the server is gone.
        """
        worker = WorkerProcess(self._door, self._folder, self._exit_code)
        self._read_ended(0.0)  # else the pipe would be full some day
        self._ended.pop(worker.pid, None)  # of an earlier process with this number
        return worker

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()  # its forks die with it
        try:
            self._process.wait(EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._news.close()
        self._stack.close()

    def _exit_code(self, pid: int) -> int | None:
        """Return how a worker ended, negative for a signal; None where the server is gone, too, and cannot say."""
        deadline = time.monotonic() + EXIT_TIMEOUT_S
        while pid not in self._ended and self._read_ended(max(0.0, deadline - time.monotonic())):
            pass
        return self._ended.get(pid)

    def _read_ended(self, timeout_s: float) -> bool:
        """Read all that is known of ended workers, waiting for the first; whether there was any."""
        found = False
        try:
            while True:
                ended = msgspec.json.decode(self._read_line(0.0 if found else timeout_s), type=Ended)
                self._ended[ended.pid] = ended.exit_code
                found = True
        except (TimeoutError, EOFError):
            return found

    def _read_line(self, timeout_s: float) -> bytes:
        return read_line(self._news.fileno(), self._buffer, timeout_s)


class RunServers(AbstractContextManager["RunServers"]):
    """The fork servers of a run, one alive at a time: one per model, number of threads, and process number.

    Forks share the addresses of their parent, so each of `--processes` draws these anew. Use as a context manager.
    """

    def __init__(self) -> None:
        self._key: tuple[str, int, int] | None = None
        self._server: ForkServer | None = None

    def start(self, model: str, n_threads: int, process: int = 0) -> None:
        """Have the server that is needed next begin to import, if it does not run yet."""
        key = model, n_threads, process
        if key != self._key or self._server is None or not self._server.alive:
            self.close()
            self._key, self._server = key, ForkServer(model, n_threads)

    def fork(self, model: str, n_threads: int, process: int = 0) -> WorkerProcess:
        """Fork a worker; a server that does not run yet is started and waited for. Raises as `ForkServer`'s methods."""
        self.start(model, n_threads, process)
        assert self._server is not None
        self._server.wait()
        return self._server.fork()

    def close(self) -> None:
        """End the server, and the workers with it."""
        if self._server is not None:
            self._server.__exit__()
            self._server = None

    def __exit__(self, *_: object) -> None:
        self.close()


def worker_environment(n_threads: int, trees: Sequence[Path] = (TREE,)) -> dict[str, str]:
    """Return the environment variables of every worker with so many threads; its own trees are imported from first."""
    return with_threads(n_threads) | {
        "PYTHONPATH": os.pathsep.join([*map(str, trees), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OPENBLAS_NUM_THREADS": str(n_threads),  # a command has it set to 1
        "PYTHONHASHSEED": "0",
        "PYTHONUTF8": "1",  # libraries read their own files in the locale's encoding
        "TOKENIZERS_PARALLELISM": "false",
        # Freed activations stay with the process: without this, glibc returns and faults in the pages of every large
        # temporary again and again (prefill of 512 tokens: 0.86 s against 0.77 s).
        "MALLOC_MMAP_THRESHOLD_": str(1 << 25),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    }
