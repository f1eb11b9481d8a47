"""Shows how near each strategy comes to its roofs, and that none passes one, over models and dtypes (10 min).

Runs every model and dtype with ceilings, one run after the other, and prints the largest MFU and MBU of each with its
case; a prefill is held against the GEMM rate, a decode step against both. Exits with 1 if a share is above 1.05: that
would be no ceiling. Models whose weights the last-level cache holds are among them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from bench.analysis.cautions import MAX_SHARE
from bench.analysis.summary import summarize
from bench.analysis.tidy import Tidy
from bench.machine.environment import read_environment
from bench.naming import namer
from bench.store.run_folder import read_run
from bench.tell.layout import markdown_table
from bench.tell.words import NOTHING, number, with_interval

HEADERS = ["model", "dtype", "weights MB", "reads MB", "largest MFU", "of", "largest MBU", "of"]
ALIGN = ["left", "left", "right", "right", "right", "left", "right", "left"]


def measured(model: str, dtype: str, arguments: list[str], out: Path) -> pd.DataFrame:
    """Run one model in one dtype, with `arguments` of `kvbench run`, and return its summary.

    Raises:
        CalledProcessError: the run failed before it measured anything.
    """
    command = [sys.executable, "-m", "bench.cli", "run", "-m", model, "--dtype", dtype, *arguments]
    done = subprocess.run([*command, "--out", str(out), "-o", "csv"], check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 5):  # 5: a case failed, the others were measured
        raise subprocess.CalledProcessError(done.returncode, command)
    (folder,) = out.glob("[!.]*")
    return summarize(Tidy.of(read_run(folder)))


def largest(summary: pd.DataFrame, share: str) -> tuple[float, str, str]:
    """Return the largest `mfu` or `mbu` of a run: as a number, with its interval, and its case in words."""
    known = summary[summary[share].notna()].to_dict("records")
    if not known:
        return 0.0, NOTHING, NOTHING
    row = max(known, key=lambda row: row[share])
    return (
        row[share],
        with_interval(row[share], row[f"{share}_low"], row[f"{share}_high"]),
        namer([row])(row, row["phase"]),
    )


def line(model: str, dtype: str, summary: pd.DataFrame) -> tuple[float, list[str]]:
    """Return the largest share of a run, and its line of the table."""
    weights, reads = summary["weights_bytes"].max(), summary["read_bytes"].dropna().unique() / 1e6
    found = [largest(summary, share) for share in ("mfu", "mbu")]
    cells = [cell for _, share, case in found for cell in (share, case)]
    read = " to ".join(dict.fromkeys(number(size) for size in (reads.min(), reads.max()))) if len(reads) else NOTHING
    return max(share for share, _, _ in found), [model, dtype, number(weights / 1e6), read, *cells]


def lines(options: argparse.Namespace, rest: list[str]) -> Iterator[tuple[float, list[str]]]:
    """Measure one model and dtype after the other."""
    for model in options.models.split(","):
        for dtype in options.dtypes.split(","):
            print(f"{model}, {dtype}", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory() as out:
                yield line(model, dtype, measured(model, dtype, rest, Path(out)))


def main() -> None:
    """Print the table; further arguments go to `kvbench run`."""
    parser = argparse.ArgumentParser(prog="nox -s study -- roofs", description=__doc__)
    parser.add_argument("--models", default="smollm2-135m,random:gpt2,random:tiny")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    options, rest = parser.parse_known_args()
    strategies = "naive,dynamic,static,compiled,hf-generate"
    found = list(lines(options, ["--strategies", strategies, "-p", "16,128,512", "-n", "16", "--budget", "3", *rest]))
    machine = read_environment()
    print("# How near the strategies come to their roofs\n")
    print(f"`nox -s study -- {' '.join(['roofs', *sys.argv[1:]])}`: the largest share of each run and its case.")
    print(f"{machine.cpu_model}, {machine.cores} cores, {machine.isa}; torch {machine.torch}.\n")
    print(markdown_table([cells for _, cells in found], HEADERS, ALIGN))
    most = max(share for share, _ in found)
    print(f"\nThe largest share is {most:.2f}: {'no roof is passed' if most <= MAX_SHARE else 'A ROOF IS PASSED'}.")
    raise SystemExit(most > MAX_SHARE)


if __name__ == "__main__":
    main()
