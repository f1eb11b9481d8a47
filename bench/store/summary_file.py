"""`summary.json`: the rows of the summary, under a head that names their form and the samples they were made of."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec

from bench.analysis.columns import COLUMNS

SUMMARY_VERSION = 1

_KINDS: dict[str, Any] = {
    "string": str,
    "Int64": Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)],
    "float64": float,
}
_Row = msgspec.defstruct("_Row", [(column.name, _KINDS[column.dtype] | None) for column in COLUMNS])
"""What a row must hold, and may hold more."""


class SummaryFile(msgspec.Struct, frozen=True):
    """What the file holds."""

    schema_version: int
    samples_sha256: str
    """See `samples_digest`."""
    rows: list[dict[str, Any]]
    """One per case and phase, by column; None where a cell is empty."""


def samples_digest(folder: Path) -> str:
    """Return the SHA-256 of all samples files of a run, one after the other by name.

    Raises:
        OSError: one cannot be read.
    """
    found = hashlib.sha256()
    for path in sorted(folder.glob("samples*.jsonl")):
        with path.open("rb") as file:
            while part := file.read(1 << 20):
                found.update(part)
    return found.hexdigest()


def document(folder: Path, rows: Sequence[dict[str, Any]]) -> str:
    """Write the file's text for the run in `folder`."""
    head = {"schema_version": SUMMARY_VERSION, "samples_sha256": samples_digest(folder), "rows": rows}
    return json.dumps(head, indent=2, allow_nan=False) + "\n"


def fitting_rows(folder: Path) -> list[dict[str, Any]] | None:
    """Return the rows stored with a run; None where there are none of this form, made of the samples as they are.

    Each has all columns of the summary, of their types.
    """
    try:
        found = msgspec.json.decode((folder / "summary.json").read_bytes(), type=SummaryFile)
        for row in found.rows:
            msgspec.convert(row, _Row)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None
    fits = found.schema_version == SUMMARY_VERSION and found.samples_sha256 == samples_digest(folder)
    return found.rows if fits else None
