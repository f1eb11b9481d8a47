"""Maps a function over items in forked processes, so that work of many seconds uses every core.

Python's own pools are not used: they keep every result until it is taken, and their processes outlive a reader that is
killed; `multiprocessing.Pool` also waits for ever for a process of its own that was killed.
"""

import gc
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")

FEWEST = 4
"""Items of a process, where one takes milliseconds: with fewer, starting it takes longer than it saves."""


def mapped(function: Callable[[A], B], items: Sequence[A], fewest: int = FEWEST) -> Iterator[B]:
    """Yield `function(item)` of each item, in their order; raises what `function` raises.

    A process gets `fewest` items at least. Each holds one result until it is taken, so that no more than these are in
    memory.

    Raises:
        EOFError: a process was killed, as by a system without memory.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1  # forking is safe on Linux
    count = min(cores, len(items) // fewest)
    if count < 2:
        yield from map(function, items)
        return
    with ExitStack() as stack:
        receivers = [stack.enter_context(_started(function, items[first::count])) for first in range(count)]
        for place in range(len(items)):
            result, error = receivers[place % count].recv()
            if error is not None:
                raise error
            yield result


@contextmanager
def _started(function: Callable[[A], B], items: Sequence[A]) -> Iterator[Connection]:
    """Fork a process that sends what it makes of its items."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    with receiver:
        forked = multiprocessing.get_context("fork").Process
        process = forked(target=_send, args=(function, items, sender, receiver), daemon=True)
        process.start()
        sender.close()
        try:
            yield receiver
        finally:
            process.terminate()
            process.join()


def _send(function: Callable[[A], B], items: Sequence[A], sender: Connection, receiver: Connection) -> None:
    """Send the result of each item, or the error that ends it; a reader that is gone ends the process."""
    receiver.close()  # while this copy is open, sending to a reader that is gone would not fail but wait
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the reader ends it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.disable()  # records refer to nothing that refers to them
    with suppress(BrokenPipeError):
        for item in items:
            try:
                result = function(item), None
            except Exception as error:  # noqa: BLE001 - the reader raises it
                sender.send((None, error))
                return
            sender.send(result)
