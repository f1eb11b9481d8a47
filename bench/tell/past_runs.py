"""What the history is asked: the list of runs as text or a file, and the trend of their latencies as a plot."""

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd

from bench.analysis.summary import summarize
from bench.analysis.tidy import Tidy
from bench.errors import UsageError
from bench.store.derived import Derived
from bench.store.history import Answer, History
from bench.store.run_folder import read_run, writing
from bench.store.summary_file import document
from bench.tell import tables
from bench.tell.layout import Fitted, markdown_table
from bench.tell.words import NOTHING, SETTING_COLUMNS, number
from kvcache.files import write_atomically

LIST = (
    "measured_utc, run, model, machine, commit, torch, transformers, cases, coalesce(measured, 0) AS measured, origin"
)
"""Columns of the list of runs; `measured` are those of the planned `cases` that have times."""

_RUNS = (
    "runs LEFT JOIN (SELECT folder, count(*) AS measured FROM rows WHERE phase = 'prefill' AND status = 'ok' "
    "GROUP BY folder) USING (folder)"
)

COMMIT_DIGITS = 9
"""Of a commit's hash, as git shortens it in a repository of this size; files have it whole."""

CASE = ["strategy", *SETTING_COLUMNS, "n_prompt", "n_gen", "n_depth", "setup"]
"""What the points of one panel have in common, and the phase."""


class Condition(NamedTuple):
    """A condition of SQL on `history`, and the values of its question marks."""

    sql: str
    values: list[str]
    asked: str
    """The flag with the user's part of it."""


def derive(folder: Path) -> list[dict[str, Any]]:
    """Make the summary of a run anew from its samples, and store it where that is possible.

    Raises:
        DataError: the run is damaged.
    """
    rows = tables.rows(summarize(Tidy.of(read_run(folder))))
    with Derived().trying("summary.json"):
        write_atomically(folder / "summary.json", document(folder, rows).encode())
    return rows


def condition(where: str | None, equal: Mapping[str, str | None]) -> Condition:
    """Join a user's condition with columns that are to have a value; None asks for nothing."""
    wanted = {f'"{name}" = ?': value for name, value in equal.items() if value is not None}
    parts = [*wanted, *([f"({where}\n)"] if where else [])]  # the line ends a comment
    return Condition(" AND ".join(parts) or "true", list(wanted.values()), f"--where {where}")


def listed(history: History, chosen: Condition, limit: int) -> Answer:
    """List the newest runs that have a row for which the condition holds; without one also those without rows.

    Raises:
        UsageError: the condition is not valid.
    """
    some = "" if chosen.sql == "true" else f" WHERE folder IN (SELECT folder FROM history WHERE {chosen.sql})"
    return _asked(
        history,
        f"SELECT {LIST} FROM {_RUNS}{some} ORDER BY measured_utc DESC, run DESC LIMIT {limit}",
        chosen,
    )


def _asked(history: History, sql: str, chosen: Condition) -> Answer:
    """Query with a user's condition; where it names a column that is not there, say which there are."""
    try:
        return history.query(sql, chosen.values, asked=chosen.asked)
    except UsageError as error:
        if "not found in FROM clause" not in str(error):
            raise
        names = history.query("SELECT * FROM history LIMIT 0", asked="the columns").columns
        raise UsageError(f"{error}; valid: {', '.join(names)}") from error


def rendered(answer: Answer, form: Literal["md", "csv", "json"]) -> str:
    """Write an answer as a Markdown table, as CSV, or as a JSON list of rows."""
    names = list(answer.columns)
    if form == "json":
        rows = json.loads(json.dumps(answer.rows, default=str), parse_constant=lambda _: None)  # JSON has no NaN
        return json.dumps(rows, indent=2) + "\n"
    if form == "csv":
        return tables.data(pd.DataFrame(answer.rows, columns=names, dtype=object), form)
    lines = _lines(answer)
    return f"{markdown_table(lines, names)}\n" if lines else "no run\n"


def terminal(answer: Answer) -> Fitted | str:
    """Make the same table for a terminal of any width."""
    names, lines = list(answer.columns), _lines(answer)
    left = frozenset(name for name, kind in answer.columns.items() if kind in ("VARCHAR", "TIMESTAMP"))
    return Fitted(None, names, lines, left, names=2) if lines else "no run"


def _lines(answer: Answer) -> list[list[str]]:
    return [[_cell(row[name], name) for name in answer.columns] for row in answer.rows]


def trend(history: History, chosen: Condition) -> pd.DataFrame:
    """Return the latencies of the rows for which the condition holds, the oldest first.

    Raises:
        UsageError: the condition is not valid, or there is no such latency.
    """
    shown = [*CASE, "phase", "machine", "measured_utc", "commit", "torch", "transformers"]
    figures = ["latency_ms", "latency_ms_low", "latency_ms_high"]
    columns = ", ".join(f'"{name}"' for name in [*shown, *figures])
    found = _asked(
        history,
        f"SELECT {columns} FROM history WHERE latency_ms IS NOT NULL AND {chosen.sql} ORDER BY measured_utc",
        chosen,
    )
    if not found.rows:
        raise UsageError("--plot: no run has such a latency")
    frame = pd.DataFrame(found.rows).fillna({"setup": ""})  # of most cases there is none
    return frame.astype(dict.fromkeys(figures, "float64")).assign(measured_utc=pd.to_datetime(frame["measured_utc"]))


def draw(history: History, chosen: Condition, path: Path) -> None:
    """Draw the trend of the latencies into a file.

    Raises:
        UsageError: there is nothing to draw, or the file cannot be written.
    """
    rows = trend(history, chosen)
    from bench.tell.plots.past_runs import trends
    from bench.tell.plots.style import encoded, own_settings

    with own_settings():
        picture = encoded(trends(rows, CASE), path.suffix)
    with writing(f"--plot {path}"):
        write_atomically(path, picture)


def _cell(value: Any, column: str) -> str:
    if value is None:
        return NOTHING
    if column == "commit":
        return str(value)[:COMMIT_DIGITS]
    return (
        f"{value:%Y-%m-%d %H:%M}"
        if isinstance(value, datetime)
        else number(value)
        if isinstance(value, float)
        else str(value)
    )
