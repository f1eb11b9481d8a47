"""The runs below a folder as a DuckDB database, `.history.duckdb` in it: made of each run's manifest and summary.json.

Only what changed since the last time is read. The samples stay the only truth: the database can be deleted at any time
and is made again, and so is a summary that does not name the samples it was made of.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.errors import DataError, KvbenchError, UsageError
from bench.store.duck import SELECT, Rows, as_json, quoted, reason
from bench.store.run_folder import read_manifest
from bench.store.samples_files import job_starts
from bench.store.summary_file import fitting_rows

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

DATABASE = ".history.duckdb"
FORM = 3
"""Of the tables; a database of another form is made again."""

RUN_COLUMNS: dict[str, str] = {
    "folder": "VARCHAR",
    "run": "VARCHAR",
    "measured_utc": "TIMESTAMP",
    "model": "VARCHAR",
    "machine": "VARCHAR",
    "commit": "VARCHAR",
    "torch": "VARCHAR",
    "transformers": "VARCHAR",
    "cpu_model": "VARCHAR",
    "gpu": "VARCHAR",
    "cases": "BIGINT",
    "origin": "VARCHAR",
    "stamp": "VARCHAR",
}
"""The table `runs`. Several models and machines stand in one cell, with commas; `folder` is the folder's name, `stamp`
how it looked when it was read."""

MADE_WITH = " (BLOCK_SIZE 16384, STORAGE_VERSION 'latest')"
"""How a new database is stored. Each column that gets a value writes at least a block anew, by default of 256 KiB, and
older forms of the file write the whole last group of 122,880 rows anew: three times the work of adding a run."""

AT_ONCE = 500
"""Runs that are read before they are stored, so that an interruption costs no more."""


class Answer(NamedTuple):
    """What a query returned."""

    columns: dict[str, str]
    """Type by name."""
    rows: Rows


class History:
    """The tables `runs` and `rows` of some folders, brought up to date as it is made, and `history`, both joined.

    `rows` has the columns of summary.csv, and `folder`. `derive` returns the summary's rows of a run whose summary.json
    does not fit, which cost a second or so.
    """

    def __init__(
        self,
        connection: DuckDBPyConnection,
        folders: Sequence[Path],
        columns: Mapping[str, str],
        derive: Callable[[Path], Rows],
    ) -> None:
        """Open and update the databases.

        Raises:
            DataError: a folder is not there, or its database cannot be read.
        """
        self._connection, self._columns, self._derive = connection, columns, derive
        self.notes: list[str] = []
        """What was skipped, and why: a line each."""
        different = {os.path.realpath(folder): folder for folder in folders}.values()
        names = {self._attach(f"f{number}", folder): folder for number, folder in enumerate(different)}
        for table in ("runs", "rows"):
            # A database has the names of its runs alone: it stays true however its folder is spelled, and moved.
            parts = [
                f"SELECT * REPLACE ({quoted(str(folder / '_')[:-1])} || folder AS folder) FROM {name}.{table}"
                for name, folder in names.items()
            ]
            connection.execute(f"CREATE TEMP VIEW {table} AS {' UNION ALL '.join(parts)}")
        joined = "SELECT rows.*, runs.* EXCLUDE (folder, model, machine) FROM runs JOIN rows USING (folder)"
        connection.execute(f"CREATE TEMP VIEW history AS {joined}")
        # A user's query reaches no file from here on, and cannot undo that.
        connection.execute("SET enable_external_access = false; SET lock_configuration = true")

    def query(self, sql: str, values: Sequence[object] = (), *, asked: str) -> Answer:
        """Return the answer to a query; `asked` is the flag that it comes from, as the user gave it.

        Raises:
            UsageError: it is not valid, or not one that only reads.
            DataError: a database is damaged.
        """
        import duckdb

        try:
            kinds = [statement.type for statement in self._connection.extract_statements(sql)]
            if kinds != [duckdb.StatementType.SELECT]:
                raise UsageError(f"{asked}: give one SELECT; the history is only read")
            found = self._connection.execute(sql, values)
            columns: dict[str, str] = {}
            for name, kind, *_ in found.description or ():
                columns[_unlike(str(name), columns)] = str(kind)
            return Answer(columns, [dict(zip(columns, row, strict=True)) for row in found.fetchall()])
        except duckdb.Error as error:
            if _is_damage(error):
                raise DataError(f"{DATABASE}: damaged ({reason(error)}); delete it: it is made again") from error
            raise UsageError(f"{asked}: {reason(error)}") from error

    def _attach(self, name: str, folder: Path) -> str:
        """Attach the folder's database, up to date; one in memory where none can be stored there. Return its name."""
        import duckdb

        if not folder.is_dir():
            raise DataError(f"{folder}: {'a file; give the folder of runs' if folder.exists() else 'no such folder'}")
        if not _is_text(folder):
            raise DataError(f"{folder}: its name is no UTF-8")
        path = folder / DATABASE
        try:
            self._open(name, str(path))
            self._update(name, folder)
        except (duckdb.IOException, duckdb.TransactionException) as error:  # the latter where it cannot be committed
            if _is_damage(error):
                raise DataError(f"{path}: damaged; delete it: it is made again from the runs") from error
            if "Could not set lock" in str(error):
                raise DataError(f"{path}: another `kvbench history` uses it; run it again") from error
            self.notes.append(f"{path}: cannot be stored ({reason(error)}); made in memory for this once")
            with suppress(duckdb.Error):  # none is open
                self._connection.execute("ROLLBACK")
            name = f"{name}_in_memory"
            self._open(name, ":memory:")
            self._update(name, folder)
        except duckdb.Error as error:
            raise DataError(f"{path}: cannot be read ({reason(error)}); delete it: it is made again") from error
        return name

    def _open(self, name: str, path: str) -> None:
        run = self._connection.execute
        run(f"ATTACH {quoted(path)} AS {name}{'' if Path(path).exists() else MADE_WITH}")
        run("BEGIN")  # a kill leaves all tables of one form
        run(f"CREATE TABLE IF NOT EXISTS {name}.form (form INTEGER, columns VARCHAR)")
        wanted = (FORM, json.dumps([*RUN_COLUMNS, *self._columns.items()]))
        if run(f"SELECT * FROM {name}.form").fetchall() != [wanted]:
            run(f"DELETE FROM {name}.form")
            run(f"INSERT INTO {name}.form VALUES (?, ?)", wanted)
            for table, columns in (("runs", RUN_COLUMNS), ("rows", {"folder": "VARCHAR", **self._columns})):
                listed = ", ".join(f'"{column}" {kind}' for column, kind in columns.items())
                run(f"CREATE OR REPLACE TABLE {name}.{table} ({listed})")
        run("COMMIT")

    def _update(self, name: str, folder: Path) -> None:
        """Read what is new or changed, forget what is gone."""
        run = self._connection.execute
        known = dict(run(f"SELECT folder, stamp FROM {name}.runs").fetchall())
        stamps = list(_stamps(folder))
        self.notes += [f"skipped: {path}: its name is no UTF-8" for path, _ in stamps if not _is_text(path)]
        found = {path.name: stamp for path, stamp in stamps if _is_text(path)}
        gone = [own for own, stamp in known.items() if found.get(own) != stamp]
        new = [own for own, stamp in found.items() if known.get(own) != stamp]
        for start in range(0, max(len(new), 1), AT_ONCE):
            read = [self._read(folder / own, found[own]) for own in new[start : start + AT_ONCE]]
            runs = [own for own in read if own is not None]
            if runs or (gone and not start):
                run("BEGIN")
                for table in ("runs", "rows") if not start and gone else ():
                    run(f"DELETE FROM {name}.{table} WHERE folder IN (SELECT unnest(?))", [gone])
                self._insert(f"{name}.runs", RUN_COLUMNS, (own for own, _ in runs))
                rows = ({"folder": own["folder"], **row} for own, rows in runs for row in rows)
                self._insert(f"{name}.rows", {"folder": "VARCHAR", **self._columns}, rows)
                run("COMMIT")

    def _insert(self, table: str, columns: Mapping[str, str], rows: Iterable[dict[str, Any]]) -> None:
        """Insert all rows at once: a statement for each would take a millisecond."""
        self._connection.execute(f"INSERT INTO {table} {SELECT}", as_json(columns, rows))

    def _read(self, folder: Path, stamp: str) -> tuple[dict[str, Any], Rows] | None:
        """Return a run's entry and its summary's rows; None, with a note, where that fails."""
        try:
            manifest = read_manifest(folder)
            starts = job_starts(folder)
            # One that was imported before has a time of a prefill that nobody measured.
            rows = fitting_rows(folder) if manifest.origin is None else None
            if rows is None:
                rows = self._derive(folder)
        except KvbenchError as error:
            self.notes.append(f"skipped: {error}")
            return None
        except Exception as error:  # noqa: BLE001 - one run must not cost the history of all others
            self.notes.append(f"skipped: {folder}: {type(error).__name__} {error}")
            return None
        if manifest.origin is not None:  # its host is not known: its processor stands for it
            own = manifest.environment
            name = ", ".join(filter(None, [own.hostname, own.gpu or own.cpu_model]))
            rows = [row | {"machine": name} for row in rows]
        machines = dict.fromkeys(row["machine"] or "" for row in rows)
        measured_on = [start.environment for start in starts if start.environment.hostname in machines]

        def facts(field: str) -> str | None:
            values = (getattr(machine, field) for machine in measured_on or [manifest.environment])
            return ", ".join(dict.fromkeys(value for value in values if value)) or None

        return {
            "folder": folder.name,
            "run": folder.name,
            "measured_utc": manifest.created_utc.removesuffix("Z").removesuffix("+00:00"),
            "model": ", ".join(dict.fromkeys(plan.case.model for plan in manifest.plan)),
            "machine": ", ".join(machines) or manifest.environment.hostname,
            "commit": facts("git_commit"),
            **{field: facts(field) for field in ("torch", "transformers", "cpu_model", "gpu")},
            "cases": len(manifest.plan),
            "origin": manifest.origin.tool if manifest.origin is not None else None,
            "stamp": stamp,
        }, rows


def _stamps(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield every run folder directly below `folder`, with what changes as soon as one of its files does."""
    for path in folder.iterdir():
        try:
            with os.scandir(path) as files:
                kept = sorted((file.name, file.stat()) for file in files if _counts(file.name))
            if kept and kept[0][0] == "manifest.json":
                # A folder's own time is that of the last file that was made or replaced in it, as summary.json is.
                sizes = (f"{found.st_mtime_ns} {found.st_size}" for _, found in kept)
                yield path, " ".join([*sizes, str(path.stat().st_mtime_ns)])
        except OSError:
            continue  # no folder


def _counts(name: str) -> bool:
    return name == "manifest.json" or (name.startswith("samples") and name.endswith(".jsonl"))


def _is_damage(error: Exception) -> bool:
    """Return whether DuckDB says that a database is cut off or overwritten."""
    signs = ("not a valid DuckDB database", "Corrupt database", "Could not read enough bytes")
    return any(sign in str(error) for sign in signs)


def _is_text(path: Path) -> bool:
    """Return whether a path is UTF-8, as all text in a database."""
    try:
        return bool(str(path).encode())
    except UnicodeEncodeError:
        return False


def _unlike(name: str, others: Iterable[str]) -> str:
    """Return the name of a column, numbered where there is one of that name: a, a_1."""
    taken, candidates = {other.casefold() for other in others}, (f"{name}_{number}" for number in itertools.count(1))
    return name if name.casefold() not in taken else next(one for one in candidates if one.casefold() not in taken)
