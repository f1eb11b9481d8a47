"""Files of records that are only ever appended to, one per line.

Every line has a checksum that continues the checksum of the line before it (the first continues a digest that the
caller gives), so that a changed, lost, doubled or swapped line is found. A line is flushed and synced before `append`
returns: a kill loses at most the line being written, which is recognised and dropped.
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
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


PART_BYTES = 8 << 20
"""Of a file that are read at a time: the objects made of their lines take some 40 MB."""


class Part(NamedTuple):
    """A stretch of a file, of whole lines."""

    path: Path
    start: int
    end: int | None
    """Where it ends, in bytes; None for the end of the file."""
    crc: int
    """The checksum that its first line continues: what the line before it says, which the part before it checks."""

    def records(self, decode: Callable[[msgspec.Raw], T | Closing]) -> list[T | Closing]:
        """Read its records, last the file's closing line; the torn last line of a killed writer is left out.

        Raises:
            DataError: it cannot be read, or its content is not what was written.
        """
        found: list[T | Closing] = []
        try:
            with self.path.open("rb") as file:
                file.seek(self.start)
                content = io.BytesIO(file.read() if self.end is None else file.read(self.end - self.start))
            self._decode(content, decode, found)
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror}") from error
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise DataError(f"{self._line(found)}: damaged ({error})") from error
        return found

    def _decode(
        self, content: io.BytesIO, decode: Callable[[msgspec.Raw], T | Closing], found: list[T | Closing]
    ) -> None:
        """Append the record of each line of `content` to `found`."""
        crc, record = self.crc, None
        for text in content:
            if type(record) is Closing:
                where = f"{self._line(found)}: stands" if text[-1:] == b"\n" else f"{self.path}: bytes stand"
                raise DataError(f"{where} after the closing line")
            if text[-1:] != b"\n":
                return
            line = _decode_line(text)
            crc = zlib.crc32(line.record, crc)
            if crc != line.crc32:
                raise DataError(f"{self._line(found)}: damaged (its checksum does not fit)")
            record = decode(line.record)
            if type(record) is Closing and record.records != (before := self.lines_before() + len(found)):
                raise DataError(f"{self._line(found)}: counts {record.records} records, {before} are there")
            found.append(record)

    def lines_before(self) -> int:
        """Count the lines of the file before this part. Raises OSError."""
        count, left = 0, self.start
        with self.path.open("rb") as file:
            while block := file.read(min(left, PART_BYTES)):
                count, left = count + block.count(b"\n"), left - len(block)
        return count

    def _line(self, before: Sequence[object]) -> str:
        """Name the line after those of this part that were read."""
        return f"{self.path}, line {self.lines_before() + len(before) + 1}"


def parts(path: Path, digest: str) -> list[Part]:
    """Divide a file into parts that can be read separately, each of at least `PART_BYTES` but for the last.

    Raises:
        DataError: it cannot be read.
    """
    found = [Part(path, 0, None, zlib.crc32(digest.encode()))]
    with suppress(msgspec.MsgspecError, UnicodeDecodeError):  # the last part holds the damaged line, and names it
        try:
            with path.open("rb") as file:
                for offset in range(PART_BYTES, path.stat().st_size, PART_BYTES):
                    file.seek(offset)
                    file.readline()
                    line = _decode_line(file.readline())
                    if file.tell() <= found[-1].start:  # a line longer than a part
                        continue
                    with suppress(msgspec.ValidationError):
                        msgspec.json.decode(line.record, type=Closing)
                        break  # nothing may stand after it
                    found[-1] = found[-1]._replace(end=file.tell())
                    found.append(Part(path, file.tell(), None, line.crc32))
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from error
    return found


def read(path: Path, digest: str, decode: Callable[[msgspec.Raw], T | Closing]) -> Content[T]:
    """Read the records of a file whose first line continues `digest`; raises as `Part.records`."""
    lines = [line for part in parts(path, digest) for line in part.records(decode)]
    finished = bool(lines) and isinstance(lines[-1], Closing)
    return Content([line for line in lines if not isinstance(line, Closing)], finished)
