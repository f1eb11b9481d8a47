"""Writes a file whole or not at all."""

import os
import secrets
from contextlib import suppress
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Write a whole file under a temporary name, sync it, and rename it into place.

    A link stays one: what it names is replaced. What is no regular file (a pipe, /dev/null) is written into.

    Raises:
        OSError: the disk is full or the folder cannot be written; no part of the file is left. Or it is a folder.
    """
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:  # its rights are the user's umask: tempfile would make it private
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
