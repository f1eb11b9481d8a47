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
from multiprocessing.connection import Connection
from pathlib import Path

import pandas as pd
import torch
from transformers.utils import logging

from tests.studies.architecture_cells import DTYPES, Cell, cells
from tests.studies.architecture_configs import TYPES
from tests.studies.architectures_page import write

TREE = Path(__file__).resolve().parents[2]
TABLE = TREE / "results" / "examples" / "architectures.csv"
LONGEST_S = 600
"""Between two cells of one type, by the clock: what waits for ever uses no processor time."""


def _child(model_type: str, dtypes: Sequence[str], out: Connection) -> None:
    warnings.simplefilter("ignore")
    torch.compiler.set_stance("force_eager")  # `compiled` runs its code as it is: a trace takes seconds
    for cell in cells(model_type, dtypes):
        out.send(cell)
    out.send(None)


def tried(model_type: str, dtypes: Sequence[str]) -> list[Cell]:
    """All cells of one type, from a process of its own; what it had said when it died or was stopped, and that."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_child, args=(model_type, dtypes, sender), daemon=True)
    process.start()
    sender.close()
    found: list[Cell] = []
    try:
        while receiver.poll(LONGEST_S):
            cell = receiver.recv()
            if cell is None:
                break
            found.append(cell)
        else:
            found.append(Cell(model_type, "", 0, "", "", "failed", reason=f"no cell within {LONGEST_S} s"))
    except EOFError:
        process.join()
        found.append(Cell(model_type, "", 0, "", "", "failed", reason=f"the process ended with {process.exitcode}"))
    process.kill()
    process.join()
    return found


def lacking(stored: pd.DataFrame, types: Sequence[str], dtypes: Sequence[str]) -> dict[str, list[str]]:
    """Return the dtypes of each type that the stored table has no cell of; none of a type that could not be built."""
    found = stored.groupby("model_type")["dtype"].agg(set).to_dict()
    unbuilt = set(stored["model_type"]) - set(stored.loc[stored["strategy"] != "", "model_type"])
    open_ = {each: [dtype for dtype in dtypes if dtype not in found.get(each, ())] for each in types}
    return {each: dtypes_ for each, dtypes_ in open_.items() if dtypes_ and each not in unbuilt}


def merged(stored: pd.DataFrame, model_type: str, dtypes: Sequence[str], found: Sequence[Cell]) -> pd.DataFrame:
    """Put a type's new cells in the place of what the table had of these dtypes, in the table's order."""
    old = (stored["model_type"] == model_type) & stored["dtype"].isin([*dtypes, ""])
    new = pd.DataFrame([asdict(cell) for cell in found]).astype(object).fillna("")
    # Of one type, float32 comes first.
    return pd.concat([stored[~old], new]).sort_values(
        ["model_type", "dtype"],
        kind="stable",
        key=lambda column: column.replace({dtype: str(at) for at, dtype in enumerate(DTYPES)}),
    )


def main() -> None:
    """Try all types, or those of --only, and write table and page."""
    parser = argparse.ArgumentParser(prog="nox -s study -- architectures", description=__doc__)
    parser.add_argument("--only", action="append", metavar="TYPE", help="Try this one again (repeatable; *, ?).")
    parser.add_argument("--jobs", type=int, default=2, help="Types at a time.")
    parser.add_argument("--missing", action="store_true", help="Try only the types and dtypes that the table lacks.")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="Which, separated by commas.")
    parser.add_argument("--page", action="store_true", help="Write docs/architectures.md from the stored table alone.")
    asked = parser.parse_args()
    types = [each for each in TYPES if any(fnmatch.fnmatch(each, name) for name in asked.only or ["*"])]
    if not types:
        parser.error(f"--only {' '.join(asked.only)}: valid: {', '.join(TYPES)}")
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    columns = [field.name for field in fields(Cell)]
    stored = pd.read_csv(TABLE, keep_default_na=False) if TABLE.exists() else pd.DataFrame(columns=columns)
    dtypes = asked.dtypes.split(",")
    wanted = lacking(stored, types, dtypes) if asked.missing else dict.fromkeys(types, dtypes)
    with ThreadPoolExecutor(asked.jobs) as pool:
        work = {} if asked.page else wanted
        answers = pool.map(tried, work, work.values())
        for done, (model_type, found) in enumerate(zip(work, answers, strict=True), 1):
            stored = merged(stored, model_type, work[model_type], found)
            outcomes = Counter(cell.outcome for cell in found)
            said = ", ".join(f"{count} {name}" for name, count in outcomes.most_common())
            print(f"{done} of {len(work)} {model_type}: {said}", file=sys.stderr, flush=True)
            stored.to_csv(TABLE, index=False, lineterminator="\n", float_format="%.2g")
    page = write(stored)
    print(page)
    if (stored["outcome"] == "silent").any():
        raise SystemExit(1)


if __name__ == "__main__":
    main()
