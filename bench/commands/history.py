"""`kvbench history`: every run below a folder as a database: a list, trends, SQL."""

import sys
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from bench.commands import flags
from bench.commands.output import emit, note, terminal
from bench.errors import UsageError

HistoryFormat = Literal["md", "csv", "json", "parquet"]


def history(
    folders: Annotated[
        list[Path] | None, Argument(metavar="FOLDER", help="Folders of run folders [default: results/runs].")
    ] = None,
    where: Annotated[
        str | None,
        Option(metavar="SQL", help="Condition on the columns of summary.csv, and on those of the list but `measured`."),
    ] = None,
    model: Annotated[str | None, Option("-m", "--model", help="Only runs of this model.")] = None,
    strategy: Annotated[str | None, Option(help="Only runs with this strategy.")] = None,
    limit: Annotated[
        int | None, Option(min=1, help="Most runs that are listed, the newest first [default: 50].")
    ] = None,
    plot: Annotated[
        Path | None, Option(metavar="FILE", help="Draw latency over time here (.png or .svg), a line per machine.")
    ] = None,
    sql: Annotated[str | None, Option(metavar="QUERY", help="A SELECT over runs, rows and history.")] = None,
    out: Annotated[Path | None, Option(metavar="FILE", help="File for the list; parquet needs one.")] = None,
    output_format: Annotated[HistoryFormat, Option("-o", "--format", help="Format of the list.")] = "md",
) -> None:
    """List the runs below a folder, the newest first, or ask for more.

    Needs `pip install 'kvbench[history]'`. A database, .history.duckdb, is kept in each folder and brought up to date
    with what changed; it can be deleted. The table `runs` has a row per run, `rows` the columns of summary.csv.

    \b
    Examples:
      kvbench history --model smollm2-135m --strategy compiled --plot trend.png
      kvbench history --where "n_prompt >= 512 and speedup_vs_naive < 10"
      kvbench history -o csv --sql "SELECT run, mbu FROM runs JOIN rows USING (folder)"
    """
    from bench.analysis import columns
    from bench.store.duck import TYPES, connect, parquet
    from bench.store.history import History
    from bench.store.run_folder import writing
    from bench.tell import past_runs
    from kvcache.files import write_atomically

    if output_format == "parquet" and out is None:
        raise UsageError("--format parquet: give --out FILE")
    if sql is not None and any((where, model, strategy, plot, limit)):
        raise UsageError("--sql: goes without --where, --model, --strategy, --limit and --plot")
    if plot is not None and plot.suffix not in (".png", ".svg"):
        raise UsageError(f"--plot {plot}: give a file that ends in .png or .svg")
    types = {column.name: TYPES[column.dtype] for column in columns.COLUMNS}
    with connect() as connection:
        found = History(connection, folders or [flags.RESULTS], types, past_runs.derive)
        note(*found.notes)
        chosen = past_runs.condition(where, {"model": model, "strategy": strategy})
        if sql is not None:
            answer = found.query(sql, asked=f"--sql {sql}".rstrip())
        else:
            answer = past_runs.listed(found, chosen, limit or 50)
        if plot is not None:
            past_runs.draw(found, chosen, plot)
            note(f"plot: {plot}")
    if out is None and output_format == "md" and sys.stdout.isatty():
        terminal().print(past_runs.terminal(answer), markup=False, highlight=False)
        return
    if output_format == "parquet":
        content = parquet(answer.columns, answer.rows)
    else:
        content = past_runs.rendered(answer, output_format).encode()
    if out is None:
        emit(content.decode())
        return
    with writing(f"--out {out}"):
        write_atomically(out, content)
    emit(f"{out}\n")
