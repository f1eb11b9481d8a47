"""Kills writers and runs, and damages stored files, at random: no record is lost, no damaged one believed (an hour)."""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from bench.record import Sample
from bench.store.run_folder import read_run
from tests.torture import Damaged, kill_a_writer

Samples = list[Sample]

ROUNDS = 40
RUN = ["run", "-m", "random:tiny", "--strategies", "naive,dynamic", "-p", "8,16", "-n", "6", "-t", "1"]
RUN += ["-r", str(ROUNDS)]

STARTING_S, MEASURING_S = 8.0, 4.0
"""Up to which a process is killed at a random moment: since it began, or since it first stored something."""


def kill_a_run(out: Path, most: int, chance: random.Random) -> list[int]:
    """SIGKILL `kvbench run`, and each `--resume` of it, at a random moment, until one ends before that.

    After `most` kills it may end in peace. The number of samples stored at each kill.
    """
    command = [sys.executable, "-m", "bench.cli"]
    words, stored, held = RUN, Samples(), list[int]()
    while True:
        process = subprocess.Popen(
            [*command, *words, "--out", str(out)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        starting = chance.random() < 0.25
        before = stored_bytes(out)
        while process.poll() is None:
            if any(out.glob("*/samples.jsonl")) if starting else stored_bytes(out) > before:
                break
            time.sleep(0.02)  # nothing tells of another process's file but the file
        longest_s = chance.random() * (STARTING_S if starting else MEASURING_S)
        with suppress(subprocess.TimeoutExpired):
            process.wait(longest_s if len(held) < most else None)
        ended = process.poll()
        process.send_signal(signal.SIGKILL)  # nothing happens to one that has ended
        process.wait()
        (folder,) = out.glob("[!.]*")
        stored = kept(folder, stored)
        if ended is not None:
            break
        held.append(len(stored))
        words = ["run", "--resume", folder.name]
    rounds = Counter(sample.case for sample in stored if not sample.warmup)
    if ended or len(rounds) != 4 or min(rounds.values()) < ROUNDS:
        raise SystemExit(f"{folder}: ended with {ended}; rounds after the resumes: {rounds}")
    return held


def stored_bytes(out: Path) -> int:
    """Size of what the runs in `out` hold."""
    return sum(path.stat().st_size for path in out.glob("*/samples*.jsonl"))


def kept(folder: Path, before: Samples) -> Samples:
    """The samples of a run, which begin with those that were there `before`."""
    now = read_run(folder).samples
    if now[: len(before)] != before:
        raise SystemExit(f"{folder}: a stored sample changed")
    return list(now)


def main() -> None:
    """Do all of it, and say what came of it."""
    parser = argparse.ArgumentParser(prog="nox -s study -- store_torture", description=__doc__)
    for name, default in (("writers", 200), ("damages", 1000), ("kills", 200), ("seed", 0)):
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
        held: list[int] = []
        runs = 0
        while len(held) < asked.kills:
            held += kill_a_run(Path(scratch, f"run-{runs}"), asked.kills - len(held), chance)
            runs += 1
            print(f"kill {len(held)} of {asked.kills}: run {runs} ended with every round", flush=True)
        print(
            f"{len(held)} kills of {runs} runs, {sum(map(bool, held))} of them with samples stored already: every run "
            "was resumed to its end, and no stored sample was lost"
        )
    if lost or told.keys() - {"refused", "same", "shorter"}:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
