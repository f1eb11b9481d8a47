"""How long `kvbench history` takes over 10,000 made runs: to list the newest 50, and to take in one more.

Writes `history.md` and `history.png`; exits with 1 where one of the two takes longer than it may (`MOST_S`).
"""

import argparse
import operator
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import msgspec
import numpy as np

from bench.analysis import columns
from bench.analysis.summary import summarize
from bench.analysis.tidy import Tidy
from bench.machine.affinity import usable_cores
from bench.store.duck import TYPES, connect
from bench.store.history import History
from bench.store.run_folder import samples_file
from bench.store.summary_file import document
from bench.tell import past_runs, tables
from tests.handmade import ENVIRONMENT, grid, make_run
from tests.stored import create_run

RUN = make_run(grid(["naive", "dynamic", "static", "hf-generate"], [128, 512], n_gen=16))
"""Eight cases, sixteen rows: about what a run of the default preset has of each prompt length."""
COLUMNS = {column.name: TYPES[column.dtype] for column in columns.COLUMNS}
ADDED = 21
"""Runs that are added one by one."""
LISTED, ONE_MORE = "`kvbench history`, the newest 50 listed", "one run more, beyond that"
MOST_S = {LISTED: 2.0, ONE_MORE: 0.05}
"""Seconds of one core that each may take."""


def store(folder: Path, numbers: range) -> None:
    """Write runs of two machines, three hours apart, with releases of torch and transformers, and slow drifts."""
    rows, records = tables.rows(summarize(Tidy.of(RUN))), [*RUN.checks, *RUN.samples]
    for number in numbers:
        release = number // 2500
        environment = msgspec.structs.replace(
            ENVIRONMENT,
            hostname=f"bench-{number % 2 + 1}",
            torch=f"2.{13 + release}.0",
            transformers=f"5.{23 + number // 1500}.0",
            git_commit=f"{number // 100:07x}",
        )
        created = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(hours=3 * number)
        manifest = msgspec.structs.replace(
            RUN.manifest,
            run_id=f"{created:%Y%m%dT%H%M%SZ}-nightly",
            created_utc=created.isoformat(timespec="seconds"),
            environment=environment,
        )
        with patch("os.fsync"):  # ten thousand waits for the disk
            path, manifest = create_run(folder, manifest)
            with samples_file(path, manifest.digest) as file:
                for record in records:
                    file.append(record)
        factor = (1 + 0.15 * (number % 2)) * (0.93**release) * np.exp(np.random.default_rng(number).normal(0, 0.01))
        names = [name for name in ("latency_ms", "latency_ms_low", "latency_ms_high") if name in rows[0]]
        own = [
            row
            | {name: row[name] * factor for name in names if row[name] is not None}
            | {"machine": environment.hostname}
            for row in rows
        ]
        (path / "summary.json").write_text(document(path, own), encoding="utf-8")


class Took(NamedTuple):
    """Seconds on the clock, and of one core: what is left of them where nothing else runs."""

    wall_s: float
    cpu_s: float


def _took(act: Callable[[], object]) -> Took:
    start, before = time.perf_counter(), os.times()
    act()
    wall_s, after = time.perf_counter() - start, os.times()
    return Took(wall_s, sum(after[:4]) - sum(before[:4]))


def refreshed(folder: Path) -> Took:
    """Bring the database up to date, as every command does first; return what it took."""

    def refresh() -> None:
        with connect() as connection:
            History(connection, [folder], COLUMNS, past_runs.derive)

    return _took(refresh)


def command(*arguments: str) -> Took:
    """Run `kvbench history` in a process of its own; return what it took."""
    line = [sys.executable, "-m", "bench.cli", "history", *arguments]
    return _took(lambda: subprocess.run(line, check=True, stdout=subprocess.DEVNULL))


def _median(times: Iterable[Took]) -> Took:
    return Took(*(statistics.median(column) for column in zip(*times, strict=True)))


def figures(folder: Path, n_runs: int) -> Iterator[tuple[str, Took]]:
    """Measure; yield what, and its times."""
    yield f"the first look at {n_runs:,} runs", refreshed(folder)
    yield LISTED, _median(command(str(folder)) for _ in range(3))
    unchanged, more = [], []
    for number in range(n_runs, n_runs + ADDED):  # in pairs: a machine's speed changes between one series and another
        unchanged.append(refreshed(folder))
        store(folder, range(number, number + 1))
        more.append(refreshed(folder))
    yield "the database brought up to date, nothing new", _median(unchanged)
    beyond = (map(operator.sub, later, before) for before, later in zip(unchanged, more, strict=True))
    yield ONE_MORE, _median(Took(*pair) for pair in beyond)


def main() -> None:
    """Make the runs, measure, write the page, and fail where a figure is above its target."""
    parser = argparse.ArgumentParser(
        prog="nox -s study -- history", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--out", type=Path, default=Path("results/examples"), help="Folder of history.md and .png.")
    parser.add_argument("--n-runs", type=int, default=10_000)
    parser.add_argument("--runs", type=Path, help="Folder for the runs, kept and used again [default: temporary].")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.runs or Path(scratch, "runs")
        if not folder.exists():
            store(folder, range(arguments.n_runs))
        lines, missed = [], []
        for what, took in figures(folder, arguments.n_runs):
            most_s = MOST_S.get(what)
            target = "" if most_s is None else f"{most_s * 1000:,.0f}"
            lines.append(f"| {what} | {took.wall_s * 1000:,.0f} | {took.cpu_s * 1000:,.0f} | {target} |")
            missed += [what] if most_s is not None and took.cpu_s > most_s else []
            print(lines[-1], flush=True)
        command(str(folder), "--strategy", "dynamic", "--plot", str(arguments.out / "history.png"))
    title = f"# `kvbench history` over {arguments.n_runs:,} made runs, on {usable_cores()} cores"
    page = [
        title,
        "",
        "`nox -s study -- history`; each run has eight cases. Medians; where nothing else runs, CPU time is all.",
        "*One run more* is what it takes beyond bringing an unchanged database up to date, whose own time is the row",
        "above it. The study fails where CPU time is above its target.",
        "",
        "| what | ms | CPU ms | at most, CPU ms |",
        "|---|---:|---:|---:|",
    ]
    picture = "![Latency over time, a line per machine](history.png)"
    (arguments.out / "history.md").write_text("\n".join([*page, *lines, "", picture, ""]), encoding="utf-8")
    if missed:
        sys.exit(f"above its target: {'; '.join(missed)}")


if __name__ == "__main__":
    main()
