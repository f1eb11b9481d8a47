"""Counts what `kvbench ab` detects and its false alarms: same revision twice, planted slow-downs, disturbances (hours).

Every run is the command itself, as a user calls it. Its outcome is appended to runs.jsonl, so that the study can be
spread over several sessions: `nox -s study -- gate_power --part aa --runs 20`, again and again. With `--runs 0` the
table and the plot are drawn from what is stored. No time is asserted.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from random import SystemRandom
from typing import Any

import psutil
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from scipy import stats
from tabulate import tabulate

from bench.machine.environment import git_commit
from bench.tell.plots import style
from tests.studies.planted import BASE, VARIABLE

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "results" / "examples" / "gate-power"

SHORT = ["-m", "random:tiny", "--strategies", "dynamic", "-p", "128", "-n", "32", "-t", "1"]
PLANTED = ["-m", "py:planted:factory", *SHORT[2:]]
LONG_STEPS = ["-m", "py:planted:smollm2", "--strategies", "dynamic", "-p", "128", "-n", "16"]
"""On every core, so that the threads of both sides outnumber them; steps long enough for turns in lockstep."""
TWELVE = [*SHORT[2:], "--strategies", "naive,dynamic,static", "-p", "32,64,128,256"]
"""Twelve cases; what is planted into steps of one token slows eight of them, naive's feed more."""
FULL = ["-m", "smollm2-135m", "--strategies", "naive,dynamic,static", "-p", "32,128,256,512", "-n", "16"]

SIZES = (0.0, 0.02, 0.03, 0.05, 0.10, 0.20)
LONG_SIZES = (0.0, 0.05, 0.10)
REAL = {"cache-dropped": (128, 0.5), "kv-clone": (1024, 1.0), "all-logits": (1024, 1.0), "item": (128, 0.25)}
"""At which length of the prompt, and for how many minutes. Of 128 tokens the cache is a quarter of a megabyte, which
costs nothing to clone; of 1,024 a step without cache takes so long that 30 s have too few pairs."""

CHANCE = SystemRandom()

Run = dict[str, Any]
Disturbance = Callable[[psutil.Process], None]


def hog(driver: psutil.Process) -> None:
    """Another program starts computing in the middle, and stays."""
    time.sleep(CHANCE.uniform(4, 10))
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        while is_running(driver):  # not `wait`, which would take the exit code from the one who started it
            time.sleep(0.1)
        other.kill()


def stopped(driver: psutil.Process) -> None:
    """A worker of either side stands still for a second."""
    time.sleep(CHANCE.uniform(5, 10))
    workers = [process for server in fork_servers(driver) for process in server.children()]
    if workers:
        chosen = CHANCE.choice(workers)
        chosen.suspend()
        time.sleep(1.0)
        if chosen.is_running():
            chosen.resume()


def pinned(driver: psutil.Process) -> None:
    """All of one side's workers may use one core alone."""
    while len(sides := fork_servers(driver)) < 2:
        time.sleep(0.05)
    CHANCE.choice(sides).cpu_affinity([0])


DISTURBANCES: dict[str, Disturbance] = {"hog": hog, "stopped": stopped, "pinned": pinned}


def is_running(process: psutil.Process) -> bool:
    """Whether it has not ended."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def fork_servers(driver: psutil.Process) -> list[psutil.Process]:
    """The processes that fork a driver's workers, base's first."""
    try:
        return [child for child in driver.children() if any("fork_server" in word for word in child.cmdline())]
    except psutil.NoSuchProcess:
        return []


def ab(part: str, what: str, words: Sequence[str], budget_min: float, disturbance: Disturbance | None = None) -> Run:
    """One `kvbench ab`; its outcome."""
    paths = [str(ROOT / "tests" / "studies"), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "bench.cli", "ab", *words, "--budget", str(budget_min), "-o", "json"]
        load, began = psutil.getloadavg()[0], time.monotonic()
        process = subprocess.Popen(
            [*command, "--out", out],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if disturbance is not None:
            threading.Thread(target=disturbance, args=[psutil.Process(process.pid)], daemon=True).start()
        try:
            told, said = process.communicate()
        except BaseException:
            process.send_signal(signal.SIGINT)
            process.wait()
            raise
    verdicts = json.loads(told)["verdicts"] if told else []
    return {
        "part": part,
        "what": what,
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "budget_min": budget_min,
        "load_1min": round(load, 2),
        "exit_code": process.returncode,
        "seconds": round(time.monotonic() - began, 1),
        "verdicts": [{key: found.get(key) for key in KEPT} for found in verdicts],
        "said": said.strip().splitlines()[-1] if not told and said.strip() else "",
    }


KEPT = ("case", "phase", "kind", "effect", "low", "high", "detectable")


def planted(kind: str, words: Sequence[str] = PLANTED) -> list[str]:
    """The arguments of a run with this slow-down in head."""
    return [*words, "--base-env", f"{VARIABLE}={BASE}", "--head-env", f"{VARIABLE}={kind}"]


def runs_of(part: str, short_min: float) -> list[tuple[str, list[str], float, Disturbance | None]]:
    """What one round of a part runs: a name, arguments, minutes, and what disturbs it."""
    match part:
        case "aa":
            return [("random:tiny", ["HEAD", "HEAD", *SHORT], short_min, None)]
        case "full":
            return [("smollm2-135m, 12 cases", ["HEAD", "HEAD", *FULL], 6.0, None)]
        case "twelve":
            return [("0.05 in 8 of 12 cases", [*planted("busy:0.05"), *TWELVE], 6.0, None)]
        case "busy":
            return [(f"{size:g}", planted(f"busy:{size:g}"), short_min, None) for size in SIZES]
        case "long-steps":
            return [
                (f"smollm2-135m, {size:g}", planted(f"busy:{size:g}", LONG_STEPS), 2.0, None) for size in LONG_SIZES
            ]
        case "real":
            return [
                (f"{kind}, p{n}", [*planted(kind), "-p", str(n)], minutes, None) for kind, (n, minutes) in REAL.items()
            ]
        case _:
            return [(name, ["HEAD", "HEAD", *SHORT], short_min, found) for name, found in DISTURBANCES.items()]


PARTS = ("aa", "full", "busy", "long-steps", "twelve", "real", "disturbed")
ASKED_FOR = frozenset({"full", "long-steps", "twelve"})
"""Parts of minutes a run, which run only where they are named."""


def found_slower(run: Run) -> bool:
    """Whether any case of a run was called a regression."""
    return any(verdict["kind"] == "regression" for verdict in run["verdicts"])


def table(runs: Sequence[Run]) -> str:
    """One row per part, setting and budget: exit codes, the share of alarms with its bounds, and the verdicts."""

    def key(run: Run) -> tuple[str, str, float]:
        return run["part"], run["what"], run["budget_min"]

    rows = []
    for part, what, budget_min in sorted(dict.fromkeys(map(key, runs)), key=lambda key: PARTS.index(key[0])):
        own = [run for run in runs if key(run) == (part, what, budget_min)]
        alarms = sum(run["exit_code"] == 1 for run in own)
        bounds = stats.binomtest(alarms, len(own)).proportion_ci(0.95, method="exact")
        codes = ", ".join(
            f"{code}: {sum(run['exit_code'] == code for run in own)}" for code in sorted({r["exit_code"] for r in own})
        )
        seconds = sorted(run["seconds"] for run in own)
        share = f"{alarms / len(own):.1%} [{bounds.low:.1%}-{bounds.high:.1%}]"
        lengths = [f"{60 * budget_min:.0f}", f"{seconds[len(own) // 2]:.0f}", f"{seconds[-1]:.0f}"]
        said = [_said(own, phase) for phase in ("decode", "prefill")]
        rows.append([part, what, len(own), alarms, share, codes, *said, *lengths])
    headers = ["part", "what", "runs", "exit 1", "share [95 % Clopper-Pearson]", "exit codes"]
    headers += ["decode: slower / same / open", "prefill: slower / same / open", "budget s", "median s", "longest s"]
    counts = Counter(f"{(run['commit'] or 'unknown')[:7]}{'+' * str(run['commit']).endswith('+')}" for run in runs)
    revisions = ", ".join(f"{revision} ({n})" for revision, n in counts.items())
    drawn = tabulate(rows, headers, tablefmt="pipe", disable_numparse=True)
    plus = "; +: of a tree with changes, were it only this count" if any("+" in revision for revision in counts) else ""
    return f"{drawn}\n\nVerdicts are counted by case and phase. Revisions, and how many runs: {revisions}{plus}.\n"


def _said(runs: Sequence[Run], phase: str) -> str:
    """How many verdicts of a phase there are of each kind."""
    found = Counter(verdict["kind"] for run in runs for verdict in run["verdicts"] if verdict["phase"] == phase)
    counts = [found[kind] for kind in ("regression", "same", "inconclusive")]
    faster = f" ({found['faster']} faster)" if found["faster"] else ""
    return " / ".join(map(str, counts)) + faster


def power_plot(runs: Sequence[Run]) -> Figure:
    """Share of runs that called the planted slow-down a regression, against its size."""
    own = [run for run in runs if run["part"] == "busy"]
    sizes = sorted({float(run["what"]) for run in own})
    n_runs = [sum(float(run["what"]) == size for run in own) for size in sizes]
    hits = [sum(float(run["what"]) == size and found_slower(run) for run in own) for size in sizes]
    shares = [hit / n for hit, n in zip(hits, n_runs, strict=True)]
    bounds = [stats.binomtest(hit, n).proportion_ci(0.95, "exact") for hit, n in zip(hits, n_runs, strict=True)]
    errors = [
        [max(0.0, share - bound.low) for share, bound in zip(shares, bounds, strict=True)],
        [max(0.0, bound.high - share) for share, bound in zip(shares, bounds, strict=True)],
    ]
    figure = style.make_figure(
        "Slow-downs that kvbench ab calls a regression",
        f"random:tiny, busy work in every decode step, {len(own)} runs",
        4.2,
    )
    axes = figure.add_subplot()
    axes.errorbar([100 * size for size in sizes], shares, yerr=errors, marker="o", color="#0072B2", capsize=3)
    axes.axhline(0.95, color=style.GUIDE, linewidth=0.8, linestyle=":")
    axes.set(
        xlabel="planted slow-down of a decode step (%), and below it the number of runs",
        ylabel="share of runs found",
        ylim=(-0.04, 1.06),
    )
    ticks = [f"{100 * size:g}\n{n}" for size, n in zip(sizes, n_runs, strict=True)]
    axes.set_xticks([100 * size for size in sizes], ticks)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(visible=True, alpha=0.3)
    return figure


def line(run: Run) -> str:
    """A run in one line."""
    found = [f"{verdict['phase']} {verdict['kind']} {verdict['effect'] or 0:+.1%}" for verdict in run["verdicts"]]
    return (
        f"{run['part']} {run['what']}: exit {run['exit_code']} in {run['seconds']} s  {', '.join(found)}{run['said']}"
    )


def main() -> None:
    """Run rounds of the parts asked for, then draw all that is stored."""
    parser = argparse.ArgumentParser(prog="nox -s study -- gate_power", description=__doc__)
    parser.add_argument(
        "--part", choices=PARTS, action="append", help=f"repeatable [default: all but {', '.join(sorted(ASKED_FOR))}]"
    )
    parser.add_argument("--runs", type=int, default=20, help="of each setting [default: 20]")
    parser.add_argument("--budget", type=float, default=0.25, help="minutes of a short run [default: 0.25]")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where runs.jsonl is added to")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    log = asked.folder / "runs.jsonl"
    for number in range(asked.runs):
        for part in asked.part or [part for part in PARTS if part not in ASKED_FOR]:
            for what, words, minutes, disturbance in runs_of(part, asked.budget):
                found = ab(part, what, words, minutes, disturbance)
                with log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(found) + "\n")
                print(f"{number + 1}/{asked.runs} {line(found)}", flush=True)
    runs = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    if runs:
        (asked.folder / "summary.md").write_text(table(runs), encoding="utf-8")
        print(table(runs))
    if any(run["part"] == "busy" for run in runs):
        power_plot(runs).savefig(asked.folder / "power.png", dpi=style.PNG_DPI)


if __name__ == "__main__":
    main()
