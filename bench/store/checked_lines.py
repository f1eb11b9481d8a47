"""Files of records that are only ever appended to, one per line.

Every line has a checksum that continues the checksum of the line before it (the first continues a digest that the
caller gives), so that a changed, lost, doubled or swapped line is found. A line is flushed and synced before `append`
returns: a kill loses at most the line being written, which is recognised and dropped.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Generic, NamedTuple, TypeVar

import msgspec

from bench.errors import DataError

T = TypeVar("T")


class Closing(msgspec.Struct, tag="closing", frozen=True):
    """The last line of a file that its writer has finished: how many records lie before it."""

    records: int


class _Line(msgspec.Struct):
    crc32: int
    record: msgspec.Raw


_decode_line = msgspec.json.Decoder(_Line).decode
_encode = msgspec.json.Encoder().encode


class Appender:
    """Appends records to `file`, which is new and now this object's.

    Use as a context manager: a normal end writes the closing line, an exception leaves the file open-ended (resumable).
    """

    def __init__(self, file: BinaryIO, digest: str) -> None:
        self._file, self._crc, self._records = file, zlib.crc32(digest.encode()), 0

    def append(self, record: msgspec.Struct) -> None:
        """Write `record` and wait until it is on the disk.

        Raises:
            OSError: the disk is full or the folder cannot be written; earlier records are safe.
        """
        self._write(record)
        self._records += 1

    def __enter__(self) -> Appender:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._write(Closing(self._records))
        finally:
            self._file.close()

    def _write(self, record: msgspec.Struct) -> None:
        encoded = _encode(record)
        self._crc = zlib.crc32(encoded, self._crc)
        self._file.write(_encode(_Line(self._crc, msgspec.Raw(encoded))) + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


class Content(NamedTuple, Generic[T]):
    """What a file holds."""

    records: list[T]
    """Each on the line of its place: the first on line 1."""
    finished: bool
    """Whether the writer finished it; otherwise it was interrupted, or still writes."""


def read(path: Path, digest: str, decode: Callable[[msgspec.Raw], T | Closing]) -> Content[T]:
    """Read the records of a file; raises as `stream`."""
    lines = list(stream(path, digest, decode))
    finished = bool(lines) and isinstance(lines[-1], Closing)
    return Content([line for line in lines if not isinstance(line, Closing)], finished)


def stream(path: Path, digest: str, decode: Callable[[msgspec.Raw], T | Closing]) -> Iterator[T | Closing]:
    """Read a file record by record, at last its closing line; the torn last line of a killed writer is left out.

    Raises:
        DataError: it cannot be read, or its content is not what was written.
    """
    crc, number, finished = zlib.crc32(digest.encode()), 0, False
    try:
        with path.open("rb") as file:
            for number, text in enumerate(file, start=1):
                if finished:
                    what = (
                        f"{path}, line {number}: stands after" if text[-1:] == b"\n" else f"{path}: bytes stand after"
                    )
                    raise DataError(f"{what} the closing line")
                if text[-1:] != b"\n":
                    return
                line = _decode_line(text)
                crc = zlib.crc32(line.record, crc)
                if crc != line.crc32:
                    raise DataError(f"{path}, line {number}: damaged (its checksum does not fit)")
                record = decode(line.record)
                if isinstance(record, Closing):
                    finished = True
                    if record.records != number - 1:
                        counted = f"counts {record.records} records, {number - 1} are there"
                        raise DataError(f"{path}, line {number}: {counted}")
                yield record
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataError(f"{path}, line {number}: damaged ({error})") from error
