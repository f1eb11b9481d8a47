"""What is done to stored data in tests/test_torture.py (a little) and by `nox -s store_torture` (a lot)."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import msgspec

from bench.baseline import Session, promote, read_sessions
from bench.record import Run
from bench.store import DataError, RunWriter, create_run, read_run
from tests.handmade import grid, make_run

CASES = grid(["naive", "dynamic"], [16, 64], n_gen=4)


def store(run: Run, out: Path) -> Path:
    """Write a hand-made run to a folder of its own."""
    folder, manifest = create_run(out, run.manifest)
    with RunWriter(folder, manifest.digest) as writer:
        for record in (*run.checks, *run.samples):
            writer.append(record)
    return folder


def kill_a_writer(out: Path, chance: random.Random) -> tuple[int, int]:
    """SIGKILL a process that stores turns, at a random moment; records that it had finished, and that are read back.

    The witness is a pipe: a byte for each `append` that has returned.
    """
    run = make_run(CASES, rounds=50)
    folder, manifest = create_run(out, run.manifest)
    seen, told = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with RunWriter(folder, manifest.digest) as writer:
                for record in (*run.checks, *run.samples):
                    writer.append(record)
                    os.write(told, b".")
                time.sleep(60)
        finally:
            os._exit(1)
    os.close(told)
    finished = len(os.read(seen, 1))  # it writes
    time.sleep(chance.random() * 0.15)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while received := os.read(seen, 1 << 16):
        finished += len(received)
    os.close(seen)
    back = read_run(folder)
    stored = [*back.checks, *back.samples]
    assert stored == [*run.checks, *run.samples][: len(stored)]
    with RunWriter(folder, manifest.digest) as writer:  # resumable: a second file goes on
        for record in [*run.checks, *run.samples][len(stored) :]:
            writer.append(record)
    resumed = read_run(folder)
    assert [*resumed.checks, *resumed.samples] == [*run.checks, *run.samples]
    return finished, len(stored)


def damage(content: bytes, chance: random.Random) -> tuple[str, bytes]:
    """One random bit flip, truncation, or swap of two lines; what it was, and the damaged content."""
    kind = chance.choice(["flip", "cut", "swap"])
    if kind == "flip":
        bit = chance.randrange(8 * len(content))
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        return f"bit {bit} flipped", bytes(damaged)
    if kind == "cut":
        length = chance.randrange(len(content))
        return f"cut to {length} bytes", content[:length]
    lines = content.splitlines(keepends=True)
    one, other = chance.randrange(len(lines)), chance.randrange(len(lines))
    lines[one], lines[other] = lines[other], lines[one]
    return f"lines {one + 1} and {other + 1} swapped", b"".join(lines)


class Damaged:
    """A run folder and a baseline whose files are damaged one at a time, and mended again."""

    def __init__(self, out: Path) -> None:
        run = make_run(CASES, rounds=3)
        self.folder = store(run, out / "runs")
        self.baseline = promote(run, out / "baselines", "b").parent
        self.run, self.sessions = read_run(self.folder), read_sessions(self.baseline)
        self.files = [*self.folder.glob("*.json*"), *self.baseline.glob("*.json")]

    def once(self, chance: random.Random) -> str:
        """Damage one file at random; "refused", "same" or "shorter", never another value.

        "shorter": the samples file was cut, so that the run reads like one that was killed there. Its records are the
        first ones of the run, unchanged, and it is no baseline: rounds are missing.

        Raises:
            AssertionError: a damaged value was accepted.
        """
        path = chance.choice(self.files)
        content = path.read_bytes()
        what, damaged = damage(content, chance)
        path.write_bytes(damaged)
        try:
            return self._read(path, what)
        finally:
            path.write_bytes(content)

    def _read(self, path: Path, what: str) -> str:
        try:
            if path.parent == self.baseline:
                sessions: list[Session] = read_sessions(self.baseline)
                assert sessions == self.sessions, f"{path}, {what}: read as another session"
                return "same"
            run = read_run(self.folder)
        except DataError as refusal:
            return "refused" if len(str(refusal).splitlines()) == 1 else f"several lines: {refusal}"
        if run == self.run:
            return "same"
        assert "cut" in what, f"{path}, {what}: read as another run"
        records, before = ([*each.checks, *each.samples] for each in (run, self.run))
        assert records == before[: len(records)], f"{path}, {what}: read as other records"
        assert run.manifest == self.run.manifest
        return "shorter"


def other_run(name: str) -> Run:
    """A hand-made run under another id."""
    run = make_run(CASES, rounds=2)
    return msgspec.structs.replace(run, path=name, manifest=msgspec.structs.replace(run.manifest, run_id=name))
