"""Fresh worker processes at the price of a fork: the libraries are imported once, every connection gets a new process.

Run by path under the interpreter of what is measured (`python -P fork_server.py DOOR FOLDER MODEL`), so this file is
the driver's while the worker may be another revision's: it may import nothing of this project but what that worker is
made of, and that of any revision. It prints one JSON line with its code path and versions, then forks a worker for each
connection that comes through the inherited socket DOOR, a file descriptor: a socket with a path would need a short one,
which TMPDIR may not be. A worker first sends its process id, or the server why there is none; for each worker that ends
the server prints a line with its exit code. A fork has its own heap, model, threads and CUDA context: none of them
exist before it. A worker's standard error goes to FOLDER/PID.errors.
"""

import ctypes
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import signal
import socket
import sys
import traceback
from contextlib import suppress
from pathlib import Path

Facts = dict[str, str | int | None]

PADDING_BYTES = 1 << 20


def main(door_number: str, folder: str, model: str) -> None:
    """Import the worker, print the introduction, and fork workers until the driver ends."""
    die_with_parent()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})  # some starters of processes leave all blocked
    news = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # where a library prints
    gc.disable()  # it would make the imports take a quarter longer
    with socket.socket(fileno=int(door_number)) as door:
        door.set_inheritable(False)
        write_line(news, introduction(model))
        gc.collect()
        gc.enable()
        gc.freeze()  # else every fork's first collection walks through, and so copies, all that was imported
        signal.signal(signal.SIGCHLD, lambda *_: reap(news))
        while descriptors := socket.recv_fds(door, 1, 1)[1]:
            with socket.socket(fileno=descriptors[0]) as connection:
                connection.set_inheritable(False)
                try:
                    is_worker = os.fork() == 0
                except OSError as error:  # too many processes: `ulimit -u`, or a container's limit
                    write_line(connection.fileno(), {"refused": error.strerror})
                    continue
                if is_worker:
                    os.close(news)
                    door.close()
                    work(connection, Path(folder))


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends; elsewhere it ends when it reads or writes next."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def write_line(file: int, facts: Facts) -> None:
    """Write a line of JSON at once."""
    os.write(file, json.dumps(facts).encode() + b"\n")


def reap(news: int) -> None:
    """Print the exit code of every worker that has ended: negative is the signal that killed it."""
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            write_line(news, {"pid": ended[0], "exit_code": os.waitstatus_to_exitcode(ended[1])})


def introduction(model: str) -> Facts:
    """Return what the driver has to know before it trusts a time: whose code this is, and what it stands on."""
    import torch

    import bench
    from bench import protocol, worker  # noqa: F401  # imported before any fork

    users_own = model.startswith("py:")
    module = model.removeprefix("py:").partition(":")[0]
    facts: Facts = {}
    if users_own:
        facts = origin(module) | description_in_a_fork(model)
    elif model:
        facts = description(model)
    return facts | {
        "version": protocol.VERSION,
        "code": str(Path(bench.__file__).resolve().parent.parent),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "transformers": importlib.metadata.version("transformers"),
        "isa": torch.backends.cpu.get_cpu_capability(),
    }


def origin(module: str) -> Facts:
    """Find the file that the user's module will be imported from: as the worker finds it, the current folder last."""
    sys.path.append(str(Path.cwd()))
    found = None
    with suppress(Exception, SystemExit):  # no module, or its parent package fails; its description says so
        found = importlib.util.find_spec(module)
    return {"model_code": str(Path(found.origin).resolve()) if found is not None and found.origin else None}


def description(model: str) -> Facts:
    """Read a model's configuration, which imports its module before any fork. No weights, no threads."""
    from kvcache import models

    try:
        found = models.describe(model)
    except models.ModelError as error:
        return {"refused": str(error)}
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        if not model.startswith("py:"):
            raise
        return {"refused": " ".join(f"{type(error).__name__}: {error}".split())}
    return {"attn_implementation": found.attn_implementation, "max_positions": found.max_positions}


def description_in_a_fork(model: str) -> Facts:
    """Do the same with a user's own code, which makes the whole model: in a fork, since it may start threads."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        try:
            write_line(writing, description(model))
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as answer:
        found: Facts = json.loads(answer.read() or b'{"refused": "its process died"}')
    os.wait()
    return found


def work(connection: socket.socket, folder: Path) -> None:
    """Be a worker on this connection, and end with it."""
    import torch

    from bench import worker

    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        die_with_parent()
        with suppress(OSError):  # not allowed in some sandboxes; then the out-of-memory killer chooses by size
            Path("/proc/self/oom_score_adj").write_text("1000")  # it takes this process first
        torch.set_num_interop_threads(1)
        with (folder / f"{os.getpid()}.errors").open("wb") as errors:
            os.dup2(errors.fileno(), sys.stdout.fileno())
            os.dup2(errors.fileno(), sys.stderr.fileno())
        # Forks share their parent's addresses: padding lays out each heap anew, as a fresh process would.
        chance = random.SystemRandom()
        padding = [bytes(chance.randrange(16, 4096)) for _ in range(256)] + [bytes(chance.randrange(PADDING_BYTES))]
        with connection, connection.makefile("rb") as requests, connection.makefile("wb") as replies:
            write_line(connection.fileno(), {"pid": os.getpid()})
            worker.serve(requests, replies)
        del padding
        code = 0
    except BaseException:  # noqa: BLE001  # it becomes the last line of the failure
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
