"""Kills and damage, many times over: `nox -s store_torture -- [--writers 200] [--damages 1000] [--runs 200]`."""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from bench.store import read_run
from tests.torture import Damaged, kill_a_writer

RUN = ["run", "-m", "random:tiny", "--strategies", "naive,dynamic", "-p", "8,16", "-n", "6", "-t", "1", "-r", "40"]


def kill_a_run(out: Path, chance: random.Random) -> tuple[int, int]:
    """SIGKILL `kvbench run` at a random moment and resume it; samples stored before, and samples at the end."""
    command = [sys.executable, "-m", "bench.cli"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([*command, *RUN, "--out", str(out)], **quiet, start_new_session=True)
    while process.poll() is None and not list(out.glob("*/samples.jsonl")):
        time.sleep(0.02)
    time.sleep(chance.random() * 12)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (folder,) = out.iterdir()
    stored = read_run(folder)
    subprocess.run([*command, "run", "--resume", folder.name, "--out", str(out)], **quiet, check=True)
    back = read_run(folder)
    if back.samples[: len(stored.samples)] != stored.samples:
        raise SystemExit(f"{folder}: a stored sample changed")
    rounds = Counter(sample.case for sample in back.samples if not sample.warmup)
    if len(rounds) != 4 or min(rounds.values()) < 40:
        raise SystemExit(f"{folder}: rounds are missing after the resume: {rounds}")
    return len(stored.samples), len(back.samples)


def main() -> None:
    """Do all of it, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("writers", 200), ("damages", 1000), ("runs", 200), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    chance = random.Random(asked.seed)  # noqa: S311
    with tempfile.TemporaryDirectory() as scratch:
        lost = 0
        for number in range(asked.writers):
            finished, stored = kill_a_writer(Path(scratch, f"writer-{number}"), chance)
            lost += max(0, finished - stored)
        print(f"{asked.writers} killed writers: {lost} finished records lost; all went on where they ended", flush=True)
        target = Damaged(Path(scratch, "damaged"))
        told = Counter(target.once(chance) for _ in range(asked.damages))
        print(f"{asked.damages} damages: {dict(told)}; none read as another value", flush=True)
        partial = 0
        for number in range(asked.runs):
            before, after = kill_a_run(Path(scratch, f"run-{number}"), chance)
            partial += before < after
            print(f"run {number + 1} of {asked.runs}: {before} samples stored, {after} after the resume", flush=True)
        print(f"{asked.runs} killed runs: {partial} in the middle, every one resumed to the end, no stored sample lost")
    if lost or told.keys() - {"refused", "same", "shorter"}:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
