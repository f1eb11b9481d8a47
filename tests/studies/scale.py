"""How long `report` and `compare` take, and how much memory, as a run grows to a million samples of 64 steps.

Makes runs of 10^4, 10^5 and 10^6 samples, as six cases and as 2,000, with ceilings beside them; then times each command
in a process of its own. Writes `scale.csv`, `scale.png` and `scale.md`, and keeps the rows of `scale.csv` that it does
not measure again. Exits with 1 where a command takes longer, or more memory, than it may (`MOST_S`, `MOST_GIB`).
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import msgspec
import numpy as np
import pandas as pd
import psutil
from matplotlib.figure import Figure

from bench.case import Case
from bench.machine.affinity import usable_cores
from bench.manifest import Manifest
from bench.record import CeilingSample, Sample
from bench.store.run_folder import samples_file
from bench.tell.layout import markdown_table
from bench.tell.plots.style import context_axis, legend_below, look, make_figure, save, value_axis
from tests.handmade import QUIET, make_check, make_run, smollm2_ms, smollm2_plan, steady_roofs
from tests.handmade import grid as cases_of
from tests.stored import create_run

SIZES = (10_000, 100_000, 1_000_000)
MOST_S, MOST_GIB = 60.0, 3.0
"""What a command may take, of whatever size; `main` fails where one that it measured takes more."""
SAMPLED_EVERY_S = 0.1
N_GEN = 65
"""64 decode steps."""
STRATEGIES = ("naive", "dynamic", "static", "hf-generate")
GRIDS: dict[str, list[Case]] = {
    "6 cases": cases_of(STRATEGIES[:3], [128, 512], n_gen=N_GEN),
    "2,000 cases": cases_of(STRATEGIES, range(64, 64 + 500 * 8, 8), n_gen=N_GEN),
}


def store(out: Path, name: str, cases: Sequence[Case], n_samples: int) -> Path:
    """Write a run of `n_samples` turns, the first of each case a warm-up, and ceilings beside each round of a cell."""
    manifest: Manifest = make_run(cases, rounds=0, warmups=0, plan=smollm2_plan).manifest
    rounds = n_samples // len(cases)
    manifest = msgspec.structs.replace(manifest, run_id=name, repetitions=rounds - 1, ceilings={"made": 1.0})
    folder, manifest = create_run(out, manifest)
    # A million lines would be a million waits for the disk.
    with patch("os.fsync"), samples_file(folder, manifest.digest) as file:
        for record in chain(map(make_check, cases), _turns(cases, rounds)):
            file.append(record)
    return folder


def _turns(cases: Sequence[Case], rounds: int) -> Iterator[Sample | CeilingSample]:
    random, order, steps = np.random.default_rng(0), 0, list(range(1, N_GEN))
    expected_ns = {case.key: np.array([smollm2_ms(case, step) for step in range(N_GEN)]) * 1e6 for case in cases}
    keys, cells = [case.key for case in cases], dict.fromkeys(case.cell for case in cases)
    roofs = [(cell.key, name, per_s) for cell in cells for name, per_s in steady_roofs(cell, 0).items()]
    for number in range(rounds):
        drift = np.exp(random.normal(0, 0.01))
        for cell, name, per_s in roofs:
            yield CeilingSample(
                cell=cell,
                ceiling=name,  # type: ignore[arg-type]  # the names of the two ceilings
                process=0,
                round=number,
                order=(order := order + 1),
                warmup=number == 0,
                kernel="dot",
                amount=round(per_s / 200),
                pass_ns=(5e6 * drift * np.exp(random.exponential(0.02, 3))).astype(int).tolist(),
                cache_bytes=33_554_432,
                covariates=QUIET,
            )
        for key in keys:
            times = expected_ns[key] * drift * np.exp(random.normal(0, 0.01) + random.exponential(0.02, N_GEN))
            prefill_ns, *step_ns = times.astype(int).tolist()
            yield Sample(
                case=key,
                process=0,
                round=number,
                order=(order := order + 1),
                warmup=number == 0,
                prefill_ns=prefill_ns,
                steps=steps,
                step_ns=step_ns,
                covariates=QUIET,
            )


class Used(NamedTuple):
    """What a command took."""

    table_s: float
    """Until its first line."""
    whole_s: float
    cpu_s: float
    """Of one core: what it takes on a machine that has nothing else to do."""
    peak_gib: float
    """Of the command and its processes together, a page that several share counted once."""

    @property
    def within(self) -> bool:
        """Whether it takes no more than it may."""
        return self.whole_s <= MOST_S and self.peak_gib <= MOST_GIB


def timed(*arguments: str) -> Used:
    """Run a command in a process of its own."""
    start = time.perf_counter()
    with (
        subprocess.Popen(
            [sys.executable, "-P", "-m", "bench.cli", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        ) as command,
        peak_gib_of(command.pid) as peak,
    ):
        assert command.stdout is not None
        command.stdout.readline()
        first_s = time.perf_counter() - start
        command.stdout.read()
        _, status, used = os.wait4(command.pid, 0)
        command.returncode = os.waitstatus_to_exitcode(status)
    if command.returncode not in {0, 3}:
        raise SystemExit(f"kvbench {' '.join(arguments)} ended with {command.returncode}")
    return Used(first_s, time.perf_counter() - start, used.ru_utime + used.ru_stime, max(peak))


@contextmanager
def peak_gib_of(pid: int) -> Iterator[list[float]]:
    """Sample the memory of a process and its children while the body runs: GiB of each look, from 0.

    A child's pages are its parent's until one of them writes, so each counts its share (PSS); resident sizes would
    count them twice.
    """
    process, sizes, ended = psutil.Process(pid), [0.0], threading.Event()

    def look_again() -> None:
        while not ended.wait(SAMPLED_EVERY_S):
            with suppress(psutil.NoSuchProcess):
                sizes.append(sum(map(_pss, [process, *process.children(recursive=True)])) / 2**30)

    watching = threading.Thread(target=look_again)
    watching.start()
    try:
        yield sizes
    finally:
        ended.set()
        watching.join()


def _pss(process: psutil.Process) -> int:
    """Return the bytes of a process, nothing of one that has ended meanwhile."""
    with suppress(psutil.NoSuchProcess, psutil.AccessDenied):  # of a process that ended and waits, it is denied
        return int(process.memory_full_info().pss)
    return 0


def main() -> None:
    """Make the runs one by one, measure, write table, picture and page after every run, and fail above a target."""
    parser = argparse.ArgumentParser(
        prog="nox -s study -- scale", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--out", type=Path, default=Path("results/examples"), help="Folder of scale.csv, .png and .md.")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="Samples of each run.")
    parser.add_argument("--runs", type=Path, help="Folder for the runs, kept and used again [default: temporary].")
    parser.add_argument("--commands", nargs="+", default=("report", "compare"), help="Commands to measure.")
    parser.add_argument("--grids", nargs="+", default=tuple(GRIDS), help=f"Of {' and '.join(GRIDS)}.")
    arguments = parser.parse_args()
    rows, missed = _stored(arguments.out), []
    with tempfile.TemporaryDirectory() as scratch:
        for n_samples in arguments.sizes:
            for grid, cases in ((grid, GRIDS[grid]) for grid in arguments.grids):
                out, name = arguments.runs or Path(scratch), f"{len(cases)}-cases-{n_samples}"
                folder = out / name if (out / name).exists() else store(out, name, cases, n_samples)
                for command in arguments.commands:
                    used = timed(command, *[str(folder)] * (1 + (command == "compare")))
                    rows[command, grid, n_samples] = used
                    missed += [] if used.within else [f"{command}, {grid}, {n_samples:,} samples"]
                    print(command, grid, n_samples, used, flush=True)
                _write(arguments.out, rows)
    if missed:
        sys.exit(f"more than {MOST_S:.0f} s or {MOST_GIB:.0f} GiB: {'; '.join(missed)}")


Rows = dict[tuple[str, str, int], Used]
"""By command, grid and number of samples."""


def _stored(out: Path) -> Rows:
    if not (out / "scale.csv").exists():
        return {}
    stored = pd.read_csv(out / "scale.csv")
    return {(row[0], row[1], int(row[2])): Used(*map(float, row[3:])) for row in stored.itertuples(index=False)}


def _write(out: Path, rows: Rows) -> None:
    ordered = sorted(rows.items(), key=lambda row: (row[0][2], list(GRIDS).index(row[0][1]), row[0][0] == "compare"))
    frame = pd.DataFrame(
        [(*key, *used) for key, used in ordered], columns=["command", "grid", "samples", *Used._fields]
    )
    frame = frame.round(3)
    frame.to_csv(out / "scale.csv", index=False, lineterminator="\n")
    words = frame.assign(samples=frame["samples"].map("{:,}".format))
    headers = ["command", "grid", "samples", "s to the table", "s in all", "CPU s", "peak GiB"]
    lines = [[f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in words.to_numpy()]
    table = markdown_table(lines, headers, ["left", "left", *["right"] * 5])
    (out / "scale.md").write_text(f"{PAGE}\n\n{table}\n\n![Time and memory against samples](scale.png)\n", "utf-8")
    save(_figure(frame), out / "scale")[1].unlink()


PAGE = f"""# Time and memory of `report` and `compare` as a run grows

Made runs of 64 decode steps a sample, ceilings beside every round, on {usable_cores()} cores (`nox -s study -- scale`).
Each command runs in a process of its own; `compare` reads two such runs. Every line's checksum is checked, as always.
CPU seconds are those of all processes of a command; the others include what it waited for, other programs too. Peak
memory is the largest sum over a command and the processes that read for it, looked at every {SAMPLED_EVERY_S} s; what
they share counts once (PSS). The study fails where a command takes over {MOST_S:.0f} s, or {MOST_GIB:.0f} GiB."""


def _figure(frame: pd.DataFrame) -> Figure:
    figure = make_figure("A run that grows: time and memory", f"64 decode steps a sample, {usable_cores()} cores", 3.8)
    for place, (column, label) in enumerate((("cpu_s", "CPU time (s)"), ("peak_gib", "peak memory (GiB)"))):
        axes = figure.add_subplot(1, 2, place + 1)
        for number, ((command, grid), own) in enumerate(frame.groupby(["command", "grid"], sort=False)):
            axes.plot(own["samples"], own[column], label=f"{command}, {grid}", linewidth=1.4, **look(number))
        context_axis(axes, frame["samples"], "samples")
        value_axis(axes, frame[column], label)
    legend_below(figure, figure.axes[0], columns=2)
    return figure


if __name__ == "__main__":
    main()
