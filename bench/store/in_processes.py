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
from typing import Any, NamedTuple, TypeVar

A = TypeVar("A")
B = TypeVar("B")

_HELD = (signal.SIGINT, signal.SIGTERM)

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
    with _started(function, items, count) as working:
        early: dict[int, tuple[Connection, _Outcome]] = {}
        for place in range(len(items)):
            while place not in early:
                ready = wait(working - {holding for holding, _ in early.values()})
                for receiver in working.intersection(ready):
                    outcome: _Outcome | None = receiver.recv()
                    if outcome is None:
                        working.remove(receiver)
                    else:
                        early[outcome.place] = receiver, outcome
            yield early.pop(place)[1].value()


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
    with _started(lambda _: function(), [None], 1) as (receiver,):
        yield lambda: receiver.recv().value()


class _Outcome(NamedTuple):
    """What became of an item."""

    place: int
    result: Any
    error: Exception | None

    def value(self) -> Any:
        """Return the result, or raise the error."""
        if self.error is not None:
            raise self.error
        return self.result


def _cores() -> int:
    """Count the cores that may be used; one where forking is not safe."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


@contextmanager
def _started(function: Callable[[A], B], items: Sequence[A], count: int) -> Iterator[set[Connection]]:
    """Fork processes that send what they make of the items; whichever is free takes the next."""
    fork = multiprocessing.get_context("fork")
    taken = fork.Value("l", 0)
    with ExitStack() as stack:
        receivers = set()
        for _ in range(count):
            receiver, sender = multiprocessing.Pipe(duplex=False)
            receivers.add(stack.enter_context(receiver))
            process = fork.Process(target=_send, args=(function, items, taken, sender, receiver), daemon=True)
            with _signals_held():
                process.start()
            stack.callback(process.join)
            stack.callback(process.terminate)
            sender.close()
        yield receivers


@contextmanager
def _signals_held() -> Iterator[None]:
    """Hold signals back, also from a process that is forked here until it takes its own: it would handle them as we do.

    One that finds no item left is ended before it has begun.
    """
    held = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _send(function: Callable[[A], B], items: Sequence[A], taken: Any, sender: Connection, receiver: Connection) -> None:
    """Send the outcome of each item that this process takes, and None at the end; a reader that is gone ends it."""
    receiver.close()  # while this copy is open, sending to a reader that is gone would not fail but wait
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the reader ends it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD)
    gc.disable()  # records refer to nothing that refers to them
    with suppress(BrokenPipeError):
        while (place := _next(taken)) < len(items):
            try:
                outcome = _Outcome(place, function(items[place]), None)
            except Exception as error:  # noqa: BLE001 - the reader raises it
                outcome = _Outcome(place, None, error)
            sender.send(outcome)
            del outcome  # before the next is made: one is in memory
        sender.send(None)


def _next(taken: Any) -> int:
    """Take an item: return its place."""
    with taken.get_lock():
        taken.value += 1
        return int(taken.value) - 1
