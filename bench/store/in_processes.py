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
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

A = TypeVar("A")
B = TypeVar("B")

_FORK = multiprocessing.get_context("fork")

FEWEST = 4
"""Items of a process, where one takes milliseconds: with fewer, starting it takes longer than it saves."""


def mapped(function: Callable[[A], B], items: Sequence[A], fewest: int = FEWEST) -> Iterator[B]:
    """Yield `function(item)` of each item, in their order; raises what `function` raises.

    There is a process for every `fewest` items, at most one for each core, and each takes the next item when it is
    done with one. Of each, one result at most waits here for its turn, and one there.

    Raises:
        EOFError: a process was killed, as by a system without memory.
    """
    count = min(_cores(), len(items) // fewest)
    if count < 2:
        yield from map(function, items)
        return
    taken = _FORK.Value("l", 0)
    with ExitStack() as stack:
        working = {stack.enter_context(_started(function, items, taken)) for _ in range(count)}
        early: dict[int, tuple[Connection, Any, Exception | None]] = {}
        for place in range(len(items)):
            while place not in early:
                ready = wait(working - {holding for holding, _, _ in early.values()})
                for receiver in working.intersection(ready):
                    found = receiver.recv()
                    if found is None:
                        working.remove(receiver)
                    else:
                        early[found[0]] = receiver, *found[1:]
            _, result, error = early.pop(place)
            if error is not None:
                raise error
            yield result


@contextmanager
def beside(function: Callable[[], B]) -> Iterator[Callable[[], B]]:
    """Call `function` in a forked process while the block runs; yields what waits for its result.

    Calling that raises what `function` raises, and EOFError where the process was killed. With one core `function` is
    called before the block, here.
    """
    if _cores() < 2:
        result = function()
        yield lambda: result
        return

    def received() -> B:
        found: tuple[int, B, Exception | None] = receiver.recv()
        if found[2] is not None:
            raise found[2]
        return found[1]

    with _started(lambda _: function(), [None], _FORK.Value("l", 0)) as receiver:
        yield received


def _cores() -> int:
    """Count the cores that may be used; one where forking is not safe."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


@contextmanager
def _started(function: Callable[[A], B], items: Sequence[A], taken: Any) -> Iterator[Connection]:
    """Fork a process that sends what it makes of the items that nobody has taken."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    with receiver:
        process = _FORK.Process(target=_send, args=(function, items, taken, sender, receiver), daemon=True)
        process.start()
        sender.close()
        try:
            yield receiver
        finally:
            process.terminate()
            process.join()


def _send(function: Callable[[A], B], items: Sequence[A], taken: Any, sender: Connection, receiver: Connection) -> None:
    """Send the place of each item with its result or error, and None at the end; a reader that is gone ends it."""
    receiver.close()  # while this copy is open, sending to a reader that is gone would not fail but wait
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the reader ends it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.disable()  # records refer to nothing that refers to them
    with suppress(BrokenPipeError):
        while (place := _next(taken)) < len(items):
            found: tuple[int, Any, Exception | None]
            try:
                found = place, function(items[place]), None
            except Exception as error:  # noqa: BLE001 - the reader raises it
                found = place, None, error
            sender.send(found)
            del found
        sender.send(None)


def _next(taken: Any) -> int:
    with taken.get_lock():
        taken.value += 1
        return int(taken.value) - 1
