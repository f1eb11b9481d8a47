"""Shows a grid on a real Slurm of three nodes: a node dies, a job is cancelled, the rest is resumed (15 minutes).

The cluster is made in a temporary folder on this machine (small_slurm.py). All of its nodes share the machine, so times
say nothing here; what is shown is that nothing is lost, counted twice or measured otherwise than without a cluster, and
that three nodes do the work of three.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import psutil

from bench.analysis.summary import summarize
from bench.analysis.tidy import Tidy
from bench.record import Run
from bench.store.run_folder import read_run
from tests import stub_run
from tests.studies.small_slurm import SmallSlurm, install

NODES = ("node1", "node2", "node3")
GRID = ["-m", "random:tiny,py:tests.studies.small_model:build", "-p", "8", "-n", "4", "-r", "1", "--no-ceilings"]
GRID += ["--dtype", "float32,bfloat16,float16", "-t", "1,2", "--strategies", "naive,dynamic"]
"""Twelve groups, and so twelve jobs, of one cell."""
EXACT = ["model", "strategy", "phase", "device", "dtype", "attn_implementation", "n_threads", "batch_size"]
EXACT += ["n_prompt", "n_gen", "n_depth", "samples", "flops", "bytes", "gemm_flops", "gemv_flops", "forward_calls"]
EXACT += ["tokens_processed", "kv_bytes_predicted", "kv_bytes_measured", "exact", "tokens_match", "status"]
"""Columns of the summary that no machine and no moment may change."""
WAIT_S, WAITING_JOBS = 25.0, 12
WAITING_GRID = ["-m", "random:tiny,random:gpt2", "--dtype", "float32,bfloat16,float16", "-t", "1,2"]
WAITING_GRID += ["-p", "8", "-n", "4", "-r", "1", "--strategies", "dynamic"]
LEAST_SPEEDUP = 2.2


def main() -> None:
    """Run the study; `--write FILE` keeps what it shows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE", help="Markdown file for the results.")
    arguments = parser.parse_args()
    install()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the daemons end, too
    with tempfile.TemporaryDirectory(prefix="kvbench-slurm-") as scratch:
        folder = Path(scratch)
        with SmallSlurm(folder / "slurm", NODES) as slurm, ended_commands():
            lines = [*disturbed_grid(slurm, folder), "", *waiting_jobs(slurm, folder)]
    text = "\n".join(["# A grid on Slurm", "", *lines, ""])
    print(text)
    if arguments.write is not None:
        arguments.write.write_text(text, encoding="utf-8")


@contextmanager
def ended_commands() -> Iterator[None]:
    """End the commands of kvbench that still run when the block ends, however it ends."""
    before = psutil.Process().children()
    try:
        yield
    finally:
        for process in psutil.Process().children():
            if process not in before:
                process.terminate()


def disturbed_grid(slurm: SmallSlurm, folder: Path) -> list[str]:
    """Measure the grid on three nodes, kill one and cancel a job meanwhile, resume, and compare with one process."""
    out = folder / "runs"
    command = ["run", *GRID, "--cluster", "slurm", "--slurm-time", "30", "--out", str(out), "--name", "slurm"]
    first = start(slurm, command)
    killed, cancelled = disturb(slurm, first, out)
    ended, code = first.communicate()[1], first.returncode
    (run_folder,) = out.glob("*-slurm")
    missing = Tidy.of(read_run(run_folder)).unfinished
    before = read_run(run_folder).samples
    slurm.up(killed)
    second = start(slurm, ["run", "--resume", run_folder.name, "--out", str(out)])
    resumed, code_2 = second.communicate()[1], second.returncode
    run = read_run(run_folder)
    check(code == 5, f"the disturbed run ended with {code}: {ended}")
    check(code_2 == 0, f"the resumed run ended with {code_2}: {resumed}")
    check(all(sample in run.samples for sample in before), "a stored sample was lost")
    once = Counter((sample.case, sample.process, sample.round) for sample in run.samples if not sample.warmup)
    check(set(once.values()) == {1}, "a round counts twice")
    alone = start(slurm, ["run", *GRID, "--out", str(out), "--name", "alone"])
    alone_said = alone.communicate()[1]
    check(alone.returncode == 0, f"the run without a cluster failed: {alone_said}")
    (alone_folder,) = out.glob("*-alone")
    differing = differences(exact_columns(run), exact_columns(read_run(alone_folder)))
    check(not differing, f"columns differ from those without a cluster: {differing}")
    by_node, rows = machines(run), len(exact_columns(run))
    check(set(by_node) == set(NODES), f"not every node measured: {by_node}")
    submitted = next(line for line in resumed.splitlines() if "jobs to measure" in line)
    said = ended.replace(f"{folder}/", "").splitlines()
    disturbance = f"While they ran, `{killed}` was killed and set DOWN, and the job {cancelled} was cancelled."
    return [
        f"{len(by_job(run))} jobs on {len(NODES)} nodes. {disturbance}",
        "",
        f"- The command ended with exit code {code}; {len(missing)} of {len(run.manifest.plan)} cases lacked rounds.",
        f"- `kvbench run --resume`: {submitted}; exit code {code_2}.",
        f"- Every sample that was stored before is there ({len(before)} of {len(run.samples)}), and every round once.",
        f"- All {len(EXACT)} columns of cases, counters and tokens equal those without a cluster ({rows} rows).",
        f"- Jobs by node: {', '.join(f'{name} {count}' for name, count in sorted(by_node.items()))}.",
        "",
        "Lines of the disturbed run:",
        "",
        *(f"    {line}" for line in said if line.startswith(("job-", "kvbench:")) or " done, " in line),
    ]


def disturb(slurm: SmallSlurm, run: subprocess.Popen[str], out: Path) -> tuple[str, str]:
    """Cancel a job and kill another's node once all have measured one; return the node and the cancelled job."""
    while True:
        check(run.poll() is None, "the run ended before all nodes had measured")
        busy, folders = slurm.running(), list(out.glob("*-slurm"))
        if len(busy) == len(NODES) and folders and have_finished(read_run(folders[0])) == set(NODES):
            break
        time.sleep(0.5)
    while (begun := slurm.running().get(NODES[0], busy[NODES[0]])) == busy[NODES[0]]:
        check(run.poll() is None, "the run ended before another job began")
        time.sleep(0.2)
    slurm.command("scancel", begun)  # which imports torch now, and has measured nothing
    slurm.down(NODES[1])
    return NODES[1], begun


def have_finished(run: Run) -> set[str]:
    """Return the nodes that have measured a case to its end."""
    torn = Tidy.of(run).unfinished
    return {run.environment(item.case).hostname for item in run.manifest.plan if item.case.key not in torn}


def waiting_jobs(slurm: SmallSlurm, folder: Path) -> list[str]:
    """Time jobs that sleep, on one node and on three: what is shared is the cluster, not the processor."""
    script = {"dynamic": [{"at": 0, "do": "slow", "seconds": WAIT_S}]}
    times = {}
    for count in (1, len(NODES)):
        out = folder / f"waiting-{count}"
        command = ["run", *WAITING_GRID, "--no-ceilings", "--cluster", "slurm"]
        options = ["--slurm-options", f"exclude={','.join(NODES[count:])}"] if count < len(NODES) else []
        stub = stub_run.variables(folder, script)
        run = start(slurm, [*command, *options, "--out", str(out)], "tests.stub_run", stub)
        output = run.communicate()[1]
        check(run.returncode == 0, f"jobs on {count} nodes failed: {output}")
        (run_folder,) = out.glob("[!.]*")
        ended = max(path.stat().st_mtime for path in run_folder.glob("samples-job-*.jsonl"))
        times[count] = ended - (run_folder / "jobs" / "submitted.jsonl").stat().st_mtime
    speedup = times[1] / times[len(NODES)]
    check(speedup >= LEAST_SPEEDUP, f"three nodes are only {speedup:.2f} times as fast as one")
    line = f"{WAITING_JOBS} jobs that wait {WAIT_S:.0f} s each, from their submission to the last sample: "
    line += f"{times[1]:.0f} s on one node, {times[len(NODES)]:.0f} s on three, {speedup:.2f} times as fast."
    return [line]


def start(
    slurm: SmallSlurm, arguments: list[str], program: str = "bench.cli", variables: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start a command of kvbench that sees the cluster."""
    root = str(Path(__file__).resolve().parents[2])
    return subprocess.Popen(
        [sys.executable, "-m", program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=root,
        env=os.environ | slurm.environment | {"PYTHONPATH": root} | (variables or {}),
    )


def exact_columns(run: Run) -> pd.DataFrame:
    """Return the columns of the summary that do not depend on the machine, row by row."""
    return summarize(Tidy.of(run)).sort_values(["case", "phase"], ignore_index=True)[["case", *EXACT]]


def differences(one: pd.DataFrame, other: pd.DataFrame) -> list[str]:
    """Name the columns in which two summaries differ."""
    if len(one) != len(other):
        return [f"{len(one)} rows against {len(other)}"]
    return [str(name) for name in one if not one[name].equals(other[name])]


def by_job(run: Run) -> dict[str, str]:
    """Return the node that measured each job."""
    return {start.job: start.environment.hostname for start in run.starts.values()}


def machines(run: Run) -> Counter[str]:
    """Count the jobs that each node measured."""
    return Counter(by_job(run).values())


def check(holds: object, otherwise: str) -> None:
    """End the study where something does not hold."""
    if not holds:
        raise SystemExit(otherwise)


if __name__ == "__main__":
    main()
