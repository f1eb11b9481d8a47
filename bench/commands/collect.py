"""`kvbench collect`: merges what jobs wrote elsewhere."""

from pathlib import Path
from typing import Annotated

from typer import Argument

from bench.commands import flags
from bench.commands.output import emit, note


def collect(
    folders: Annotated[
        list[Path], Argument(metavar="FOLDER", help="Folders with samples files of jobs, as copies of a run folder.")
    ],
    out: flags.Out = flags.RESULTS,
) -> None:
    """Merge what the jobs of a cluster run wrote elsewhere.

    Where nodes share no file system, each job writes into a copy of the run folder. Its samples are checked and copied
    to their run under --out. What lies there already is not copied again, so a folder may be collected
    twice. The run folders are printed.

    \b
    Examples:
      kvbench collect node1/ node2/ node3/
      kvbench collect downloads/* && kvbench report 20261123T040000Z-grid
    """
    from bench.errors import DataError
    from bench.store.collect import collect as collect_folder
    from bench.store.run_folder import read_run

    runs: dict[Path, None] = {}
    for folder in folders:
        for source, target, is_new in collect_folder(folder, out):
            if target is None:
                note(f"{source}: left out: its job was killed before its first record")
                continue
            note(f"{source}: {'copied to' if is_new else 'lies already in'} {target}")
            runs[target.parent] = None
    for run in runs:
        try:
            read_run(run)
        except DataError as error:
            note(f"{run}: cannot be read until the missing file is collected, too ({error})")
    emit("".join(f"{run}\n" for run in runs))
