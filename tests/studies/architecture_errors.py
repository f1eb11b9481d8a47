"""What a cell of the matrix may raise: its time limit, and an error in one line with the place it came from."""

import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import kvcache
from kvcache.caches.contract import Unsupported
from kvcache.proof.tokens import NonFiniteLogits, NotRepeatable, WrongShape

CELL_S = 60
"""Processor time of one cell: a machine that is busy, or stops the study for a while, changes no outcome."""
_AGAIN_S = 10
"""Whoever catches everything is stopped again after so long."""
_OWN = Path(kvcache.__file__).parent


class Slow(Exception):
    """A cell took longer than `CELL_S`."""


class _Stop(BaseException):
    """Leaves code that catches every Exception."""


@contextmanager
def limited(cell_s: float = CELL_S) -> Iterator[None]:
    """Stop what takes longer than `cell_s` seconds of processor time.

    Raises:
        Slow: it did.
    """

    def stop(*_: object) -> None:
        raise _Stop

    before = signal.signal(signal.SIGPROF, stop)
    try:
        signal.setitimer(signal.ITIMER_PROF, cell_s, _AGAIN_S)
        yield
    except _Stop:
        raise Slow(f"no end within {cell_s} s of processor time") from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def is_own(error: Exception) -> bool:
    """Return whether kvcache's own code raised it, and no library that it called."""
    return _OWN in Path(traceback.extract_tb(error.__traceback__)[-1].filename).parents


def line(error: Exception) -> str:
    """Return the error in one line; where it is no sentence for users, with its class and place in transformers."""
    text = " ".join(str(error).split())[:300]
    if text and isinstance(error, (Unsupported, NotRepeatable, NonFiniteLogits, WrongShape, Slow)):
        return text
    if text and isinstance(error, ValueError) and is_own(error):
        return text
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/transformers/" in frame.filename]
    place = f" (transformers, {Path(frames[-1].filename).name}, {frames[-1].name})" if frames else ""
    return f"{type(error).__name__}: {text}{place}"
