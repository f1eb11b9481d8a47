"""One JSON document in one file: versioned, sealed by a digest of itself, and written whole or not at all."""

import hashlib
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from bench.errors import DataError
from kvcache.files import write_atomically

D = TypeVar("D", bound=msgspec.Struct)
"""A struct that can be sealed: it has the fields `schema_version: int` and `digest: str`."""


def sealed(document: D) -> D:
    """Return `document` with its digest: the SHA-256 of the document with an empty digest."""
    blank = msgspec.structs.replace(document, digest="")
    return msgspec.structs.replace(document, digest=_sha256(blank))


def write(path: Path, document: D) -> D:
    """Seal and write a document, and return it with its digest.

    Raises:
        OSError: the disk is full or the folder cannot be written; no part of the file is left.
    """
    document = sealed(document)
    write_atomically(path, msgspec.json.format(msgspec.json.encode(document)) + b"\n")
    return document


def read(path: Path, kind: type[D], version: int) -> D:
    """Read a document of `kind` and check its seal.

    The digest is that of the stored fields, not of the struct's: a document that was stored before `kind` gained an
    optional field keeps its seal.

    Raises:
        DataError: it is missing, damaged, or not stored in `version` of its form.
    """
    try:
        content = path.read_bytes()
        fields = msgspec.json.decode(content, type=dict[str, Any])
        stored = fields.get("schema_version")
        if isinstance(stored, int) and stored != version:
            age, advice = ("newer", "upgrade kvbench") if stored > version else ("older", "measure it again")
            raise DataError(f"{path}: schema {stored} is {age} than this kvbench reads ({version}); {advice}")
        document = msgspec.json.decode(content, type=kind)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: damaged ({error})") from error
    if fields.get("digest") != _sha256(fields | {"digest": ""}):
        raise DataError(f"{path}: damaged (its digest does not fit its content)")
    return document


def _sha256(document: object) -> str:
    return hashlib.sha256(msgspec.json.encode(document)).hexdigest()
