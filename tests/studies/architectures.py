"""Runs every causal language model of transformers, shrunken, by every strategy, and says which is right (an hour).

Each is measured as kvbench does it: against the parallel forward, or naive re-feed where a forward is not
prefix-stable; in float32 and bfloat16, at batch 1 and 3, with a whole prompt, after a context, in three chunks, and
left-padded. Writes results/examples/architectures.csv and docs/architectures.md.
"""

import argparse
import fnmatch
import multiprocessing
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from functools import partial
from importlib.metadata import version
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pandas as pd
import psutil
import torch
from transformers.utils import logging

from tests.studies.architecture_cell import Cell, is_whole
from tests.studies.architecture_cells import DTYPES, cells, cells_of_bytes
from tests.studies.architecture_configs import TYPES
from tests.studies.architecture_errors import CELL_S
from tests.studies.architecture_rules import STOP, with_causes
from tests.studies.architectures_page import write

TREE = Path(__file__).resolve().parents[2]
TABLE = TREE / "results" / "examples" / "architectures.csv"
IDLE_S, WORKED_S = 300, 20 * CELL_S
"""Between two cells of one type: seconds in which its process uses no processor, and processor time that it may use."""
KEY = ["model_type", "dtype", "batch_size", "strategy", "scenario"]
BYTES = ["kv_bytes_measured", "kv_bytes_predicted", "kv_bytes_allocated", "kv_bytes_allocated_predicted", "unpredicted"]
VERSIONS = {name: version(name).partition("+")[0] for name in ("transformers", "torch")}


def _child(model_type: str, dtypes: Sequence[str], bytes_only: bool, out: Connection) -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.compiler.set_stance("force_eager")  # `compiled` runs its code as it is: a trace takes seconds
    for cell in cells_of_bytes(model_type) if bytes_only else cells(model_type, dtypes):
        out.send(cell)
    out.send(None)


def tried(model_type: str, dtypes: Sequence[str], *, bytes_only: bool = False) -> list[Cell]:
    """All cells of one type, from a process of its own; what it had said when it died or was stopped, and that."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    # Not forked from here: threads of this process may hold locks that nobody in the child would release.
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_child, args=(model_type, dtypes, bytes_only, sender), daemon=True)
    process.start()
    sender.close()
    found: list[Cell] = []
    try:
        while _answers(process, receiver):
            cell = receiver.recv()
            if cell is None:
                break
            found.append(cell)
        else:
            found.append(Cell(model_type, "", 0, "", "", "failed", reason=f"{STOP} it: no cell for long"))
    except EOFError:
        process.join()
        found.append(Cell(model_type, "", 0, "", "", "failed", reason=f"{STOP}: it ended with {process.exitcode}"))
    process.kill()
    process.join()
    return found


def _answers(process: BaseProcess, receiver: Connection) -> bool:
    """Wait for the next cell, or the end; False if none comes. Time in which the machine is stopped does not count."""
    idle, used, begin = 0, _processor_s(process), _processor_s(process)
    while not receiver.poll(1):
        now = _processor_s(process)
        idle, used = idle + 1 if now == used else 0, now
        if idle >= IDLE_S or used - begin >= WORKED_S:
            return False
    return True


def _processor_s(process: BaseProcess) -> float:
    try:
        times = psutil.Process(process.pid).cpu_times()
    except psutil.NoSuchProcess:  # the pipe says so next
        return 0.0
    return float(times.user + times.system)


def lacking(stored: pd.DataFrame, types: Sequence[str], dtypes: Sequence[str]) -> dict[str, list[str]]:
    """Return the dtypes of each type that the stored table has not every cell of; none of a type that was not built."""
    unbuilt = set(stored.loc[(stored["scenario"] == "") & (stored["outcome"] == "refused"), "model_type"])
    where = ["batch_size", "strategy", "scenario", "reason"]
    whole = {
        key
        for key, rows in stored.groupby(["model_type", "dtype"])
        if is_whole(set(rows[where].itertuples(index=False)))
    }
    lacked = {each: [dtype for dtype in dtypes if (each, dtype) not in whole] for each in types if each not in unbuilt}
    return {each: dtypes_ for each, dtypes_ in lacked.items() if dtypes_}


def merged(stored: pd.DataFrame, model_type: str, dtypes: Sequence[str], found: Sequence[Cell]) -> pd.DataFrame:
    """Put a type's new cells in the place of what the table had of these dtypes, in the table's order."""
    old = (stored["model_type"] == model_type) & stored["dtype"].isin([*dtypes, ""])
    new = _rows(found).assign(**VERSIONS)
    # Of one type, float32 comes first.
    return pd.concat([stored[~old], new]).sort_values(
        ["model_type", "dtype"],
        kind="stable",
        key=lambda column: column.replace({dtype: str(at) for at, dtype in enumerate(DTYPES)}),
    )


def with_bytes(stored: pd.DataFrame, found: Sequence[Cell]) -> pd.DataFrame:
    """Put the bytes of `found` into the rows that the table has of the same cells."""
    new = _rows(found).set_index(KEY)[BYTES]
    filled = stored.set_index(KEY).astype(dict.fromkeys(BYTES, object))  # read from the table they are text
    filled.update(new[new.index.isin(filled.index)])
    return filled.reset_index()[stored.columns]


def _rows(found: Sequence[Cell]) -> pd.DataFrame:
    """Make a row of each cell; of shares two digits are kept, more of them are noise."""
    names = [field.name for field in fields(Cell)]
    rows = pd.DataFrame([asdict(cell) for cell in found], columns=names, dtype=object)  # bytes stay whole numbers
    for share in ("logits_error", "rounding_error"):
        rows[share] = [float(f"{value:.2g}") if pd.notna(value) else "" for value in rows[share]]
    return rows.fillna("")


def main() -> None:
    """Try all types, or those of --only, and write table and page."""
    parser = argparse.ArgumentParser(prog="nox -s study -- architectures", description=__doc__)
    parser.add_argument("--only", action="append", metavar="TYPE", help="Try this one again (repeatable; *, ?).")
    parser.add_argument("--jobs", type=int, default=2, help="Types at a time.")
    parser.add_argument("--missing", action="store_true", help="Try only the types and dtypes that the table lacks.")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="Which, separated by commas.")
    parser.add_argument("--bytes", action="store_true", help="Count bytes alone, into the cells that the table has.")
    parser.add_argument("--page", action="store_true", help="Write table and page anew from the stored table alone.")
    asked = parser.parse_args()
    types = [each for each in TYPES if any(fnmatch.fnmatch(each, name) for name in asked.only or ["*"])]
    if not types:
        parser.error(f"--only {' '.join(asked.only)}: valid: {', '.join(TYPES)}")
    stored = pd.read_csv(TABLE, keep_default_na=False) if TABLE.exists() else _rows([])
    dtypes = asked.dtypes.split(",")
    wanted = lacking(stored, types, dtypes) if asked.missing else dict.fromkeys(types, dtypes)
    multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.studies.architecture_cells"])
    with ThreadPoolExecutor(asked.jobs) as pool:
        work = {} if asked.page else wanted
        answers = pool.map(partial(tried, bytes_only=asked.bytes), work, work.values())
        for done, (model_type, found) in enumerate(zip(work, answers, strict=True), 1):
            stored = with_bytes(stored, found) if asked.bytes else merged(stored, model_type, work[model_type], found)
            outcomes = Counter(cell.outcome for cell in found)
            said = ", ".join(f"{count} {name}" for name, count in outcomes.most_common())
            print(f"{done} of {len(work)} {model_type}: {said}", file=sys.stderr, flush=True)
            with_causes(stored).to_csv(TABLE, index=False, lineterminator="\n")
    stored = with_causes(stored)
    stored.to_csv(TABLE, index=False, lineterminator="\n")
    print(write(stored))
    if (stored["outcome"] == "silent").any():
        raise SystemExit(1)


if __name__ == "__main__":
    main()
