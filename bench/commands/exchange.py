"""`kvbench export` and `kvbench import`: a run in the formats of other tools, and llama-bench's results as a run."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from bench.commands import flags
from bench.commands.output import emit, note
from bench.errors import UsageError
from bench.tell.formats import ExportFormat


def export(
    run: Annotated[str, Argument(metavar="RUN", help="Run folder, or its name in results/runs.")],
    to: Annotated[ExportFormat, Option("--to", help="Format to write.")],
    out: Annotated[
        Path | None,
        Option(
            metavar="FILE", help="File to write; - for stdout [default: a file in the run's folder, which is named]."
        ),
    ] = None,
) -> None:
    """Write a run in the format of another tool.

    bmf: Bencher, latency in ns and tokens/s with intervals. github-action-benchmark: two files, for
    customSmallerIsBetter and customBiggerIsBetter. llama-bench: JSONL with its field names. benchstat: Go's format, a
    line per turn. parquet: all columns of summary.csv; needs `pip install 'kvbench[history]'`.

    \b
    Examples:
      kvbench export 20261123T040000Z-mine --to bmf --out mine.json
      kvbench export 20261123T040000Z-mine --to llama-bench --out mine.jsonl
    """
    from bench.analysis.summary import summarize
    from bench.analysis.tidy import Tidy
    from bench.naming import plural
    from bench.store.run_folder import find_run, read_run, writing
    from bench.tell.exchange import EXPORTERS
    from bench.tell.exchange.llama_bench import left_out
    from kvcache.files import write_atomically

    if out is not None and out.is_dir():
        raise UsageError(f"--out {out}: is a folder; give a file")
    folder = find_run(run, flags.RESULTS)
    tidy = Tidy.of(read_run(folder))
    summary = summarize(tidy)
    made = EXPORTERS[to](tidy, summary)
    # An imported generation is ok, and has no time of a prefill to lose.
    lacking = summary["latency_ms"].isna() & (summary["status"] != "ok")
    if to != "parquet" and (untimed := int(lacking.sum())):
        note(f"left out: {plural(untimed, 'row')} of the summary without a time; `kvbench report` shows why")
    if to == "llama-bench" and (lost := left_out(tidy)):
        note(f"left out: {plural(lost, 'case')} with several sequences in a batch, which llama-bench does not have")
    if out == Path("-"):
        if to == "parquet" or len(made) > 1:
            raise UsageError(f"--out -: {to} is not one text; give a file")
        emit("".join(content.decode() for content in made.values()))
        return
    for name, content in made.items():
        path = folder / name if out is None else out
        if out is not None and len(made) > 1:
            path = out.with_name(f"{out.stem}-{name.split('-')[1]}{out.suffix}")  # -smaller and -bigger
        with writing(f"--out {path}"):
            write_atomically(path, content)
        emit(f"{path}\n")


def import_(
    file: Annotated[Path, Argument(metavar="FILE", help="Results of llama-bench: json, jsonl, or a sqlite database.")],
    out: flags.Out = flags.RESULTS,
    name: Annotated[
        str | None, Option(metavar="TEXT", help="Name of the run folder, appended to the time of the first test.")
    ] = None,
) -> None:
    """Store llama-bench's results as a run folder.

    `kvbench report` and `compare` then show them beside your runs, marked as measured elsewhere and without intervals
    of ratios. pp512 becomes the prefill of 512 tokens; tg128 at depth 512 the case `-p 1 -n 128 -d 512`, each token
    with its share of the time.

    \b
    Example:
      llama-bench -m model.gguf -p 512 -n 128 -d 0,512 -o jsonl > llama.jsonl
      kvbench import llama.jsonl
    """
    from bench.store.imported import store

    folder, notes = store(file, out, name)
    note(*notes)
    emit(f"{folder}\n")
