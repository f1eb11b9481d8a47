"""Fresh worker processes at the price of a fork: the libraries are imported once, every connection gets a new process.

Run by path under an arm's interpreter (`python -P fork_server.py SOCKET MODEL`), so this file is the driver's while the
worker that it serves is the arm's own: it may import nothing of this project but what that worker is made of, and
that of any revision. It says who it is in one line of JSON, then forks a worker for each connection to SOCKET, which
first tells its process id. A fork has its own heap, model and threads: none of them exist before it.
"""

from __future__ import annotations

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
from contextlib import suppress
from pathlib import Path

Facts = dict[str, str | int | None]

PADDING_BYTES = 1 << 20


def main(path: str, model: str) -> None:
    """Import the worker, say who we are, and serve until the driver ends."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    hello = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no part of what we say
    gc.disable()  # it would make the imports take a quarter longer
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(path)
        door.listen()
        print(json.dumps(introduction(model)), file=hello, flush=True)
        gc.collect()
        gc.enable()
        gc.freeze()  # else every fork's first collection walks through, and so copies, all that was imported
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the workers
        while True:
            connection, _ = door.accept()
            if os.fork() == 0:
                door.close()
                work(connection)
            connection.close()


def introduction(model: str) -> Facts:
    """What the driver has to know before it trusts a time: whose code this is, and what it stands on."""
    import torch

    from bench import protocol, worker

    users_own = model.startswith("py:")
    module = model.removeprefix("py:").partition(":")[0]
    own = origin(module) | description_apart(model) if users_own else description(model)
    return own | {
        "version": protocol.VERSION,
        "code": str(Path(worker.__file__).resolve().parent.parent),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "transformers": importlib.metadata.version("transformers"),
        "isa": torch.backends.cpu.get_cpu_capability(),
    }


def origin(module: str) -> Facts:
    """The file that the user's module will be imported from: as the worker finds it, the current folder last."""
    sys.path.append(str(Path.cwd()))
    found = None
    with suppress(Exception, SystemExit):  # no module, or its parent package fails; its description says so
        found = importlib.util.find_spec(module)
    return {"model_code": str(Path(found.origin).resolve()) if found is not None and found.origin else None}


def description(model: str) -> Facts:
    """What a model's configuration says; its own module is then imported before any fork. No weights, no threads."""
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


def description_apart(model: str) -> Facts:
    """The same of a user's own code, which makes the whole model: in a fork, since it may start threads."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        try:
            os.write(writing, json.dumps(description(model)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as told:
        found: Facts = json.loads(told.read() or b'{"refused": "its process died"}')
    os.wait()
    return found


def work(connection: socket.socket) -> None:
    """Be a worker on this connection, and end with it."""
    from bench import worker

    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        worker.die_with_parent()
        # Forks share their parent's addresses: padding lays out each heap anew, as a fresh process would.
        chance = random.SystemRandom()
        padding = [bytes(chance.randrange(16, 4096)) for _ in range(256)] + [bytes(chance.randrange(PADDING_BYTES))]
        with connection, connection.makefile("rb") as requests, connection.makefile("wb") as replies:
            replies.write(json.dumps({"pid": os.getpid()}).encode() + b"\n")
            replies.flush()
            worker.serve(requests, replies)
        del padding
        code = 0
    finally:
        os._exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
