"""Rows in DuckDB, and out of it as Apache Parquet: what the history and the export share."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.errors import UsageError

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

TYPES = {"string": "VARCHAR", "Int64": "BIGINT", "float64": "DOUBLE", "bool": "BOOLEAN"}
"""A column's type in a frame -> in the database."""

Rows = list[dict[str, Any]]


@contextmanager
def connect() -> Iterator[DuckDBPyConnection]:
    """Open a database in memory.

    Raises:
        UsageError: DuckDB is not installed.
    """
    try:
        import duckdb
    except ImportError as error:
        raise UsageError("DuckDB is not installed: pip install 'kvbench[history]'") from error
    with duckdb.connect(config={"autoinstall_known_extensions": False}) as connection:  # nothing is downloaded
        yield connection


def parquet(columns: Mapping[str, str], rows: Iterable[dict[str, Any]]) -> bytes:
    """Write rows as Apache Parquet; `columns` are the types of DuckDB by name.

    Raises:
        UsageError: DuckDB is not installed, the temporary folder has no room, or Parquet has no such type.
    """
    with connect() as connection:
        import duckdb

        try:
            with tempfile.TemporaryDirectory() as folder:
                connection.execute(f"CREATE TABLE made AS {SELECT}", as_json(columns, rows))
                path = Path(folder, "rows.parquet")
                connection.execute(f"COPY made TO {quoted(str(path))} (FORMAT parquet)")
                return path.read_bytes()
        except (duckdb.IOException, OSError) as error:
            raise UsageError(f"parquet: {reason(error)}; set TMPDIR to a folder with room") from error
        except duckdb.Error as error:
            raise UsageError(f"parquet: {reason(error)}") from error


SELECT = "SELECT unnest(from_json(?, ?), max_depth := 2)"
"""Rows out of a JSON text and the types of its columns."""


def as_json(columns: Mapping[str, str], rows: Iterable[dict[str, Any]]) -> list[str]:
    """Return the values of `SELECT` for these rows."""
    listed = [{name: row.get(name) for name in columns} for row in rows]
    return [json.dumps(listed, default=str), json.dumps([columns])]


def quoted(text: str) -> str:
    """Write a text as SQL does."""
    return "'" + text.replace("'", "''") + "'"


def reason(error: Exception) -> str:
    """Return the first line of what DuckDB says."""
    return str(error).splitlines()[0].strip()
