"""stdout and stderr that may be closed, full or no longer read: a command does its work all the same."""

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO, cast


class Stream:
    """A text stream whose first failed write is remembered; what is written after it is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure: OSError | None = None
        """None also if the reader has seen enough (`| head`), which is no error."""
        self.lost = False
        """Whether nobody gets what is written from now on."""

    def write(self, text: str) -> int:
        """Write `text`; return its length, as any text stream does."""
        with self._surviving():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Write what is buffered."""
        with self._surviving():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.lost = True
            if error.errno != errno.EPIPE and self.failure is None:
                self.failure = error
            # Python flushes the stream once more at its end: what is still buffered must have somewhere to go.
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


@contextmanager
def lasting_streams() -> Iterator[Stream]:
    """Make stdout and stderr lasting `Stream`s while a command runs, and yield stdout's.

    A closed descriptor is opened on the null device: otherwise the next file that is opened, such as one of samples,
    would get its number, and whatever a library prints.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest number that is free
    with (
        _stream(sys.stdout) as out,
        _stream(sys.stderr) as errors,
        redirect_stdout(cast("TextIO", out)),
        redirect_stderr(cast("TextIO", errors)),
    ):
        yield out
        out.flush()
        errors.flush()


@contextmanager
def _stream(stream: TextIO | None) -> Iterator[Stream]:
    """Wrap `stream`; None, as Python gives for a descriptor that was closed, is the null device."""
    if stream is None:
        with open(os.devnull, "w", encoding="utf-8") as null:  # noqa: PTH123 - no path of a file
            yield Stream(null)
        return
    if isinstance(stream, io.TextIOWrapper) and stream.errors in {"strict", "surrogateescape"}:
        # A character that the locale lacks must not lose a table. In the C locale Python chooses surrogateescape.
        stream.reconfigure(errors="backslashreplace")
    with suppress(OSError):
        os.set_blocking(stream.fileno(), True)  # a full pipe is waited for, not an error
    yield Stream(stream)
