"""Kills writers and damages stored data: a little in tests/store/test_torture.py, a lot in the study store_torture."""

import os
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from bench.ab import record
from bench.ab.record import AbManifest, Settings, Side
from bench.analysis.tidy import unfinished
from bench.errors import DataError
from bench.judge.baseline import promote
from bench.record import Record, Run
from bench.store import sealed
from bench.store.checked_lines import Appender
from bench.store.run_folder import read_run, samples_file
from bench.store.sessions import read_sessions
from tests.handmade import grid, make_run
from tests.stored import create_run
from tests.synthetic import Machine

CASES = grid(["naive", "dynamic"], [16, 64], n_gen=4)


def store(run: Run, out: Path) -> Path:
    """Write a hand-made run to a folder of its own."""
    folder, manifest = create_run(out, run.manifest)
    with samples_file(folder, manifest.digest) as writer:
        for record in turns_and_checks(run):
            writer.append(record)
    return folder


def turns_and_checks(run: Run) -> list[Record]:
    """Give the records of a hand-made run in the order in which they are stored."""
    return [*run.checks, *run.samples]


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
            with samples_file(folder, manifest.digest) as writer:
                for record in turns_and_checks(run):
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
    stored = turns_and_checks(back)
    assert stored == turns_and_checks(run)[: len(stored)]
    with samples_file(folder, manifest.digest) as writer:  # resumable: a second file goes on
        for record in turns_and_checks(run)[len(stored) :]:
            writer.append(record)
    resumed = read_run(folder)
    assert turns_and_checks(resumed) == turns_and_checks(run)
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


def store_ab(out: Path) -> Path:
    """Write an A/B that was never measured to a folder."""
    manifest = sealed.sealed(
        AbManifest(
            schema_version=record.AB_VERSION,
            created_utc="2026-01-01T00:00:00+00:00",
            command=["kvbench", "ab", "main"],
            settings=Settings(),
            base=Side(name="base", label="main"),
            head=Side(name="head", label="mine", variables={"A": "1"}),
            introductions={},
            environment=make_run([]).manifest.environment,
            cases=CASES,
        )
    )
    measure = Machine().pairs(0)
    out.mkdir(parents=True)
    sealed.write(out / record.MANIFEST, manifest)
    lines = Appender((out / record.PAIRS).open("xb"), manifest.digest)
    for taken in (taken for number in range(3) for taken in measure(number, CASES)):
        lines.append(taken)
    lines.__exit__(None)
    return out


class Damaged:
    """A run folder, an A/B and a baseline whose files are damaged one at a time, and mended again."""

    def __init__(self, out: Path) -> None:
        run = make_run(CASES, rounds=3)
        self.folder, self.ab = store(run, out / "runs"), store_ab(out / "ab")
        self.baseline = promote(run, out / "baselines", "b").parent
        self.before = {folder: _content(folder) for folder in (self.folder, self.ab, self.baseline)}
        self.files = [path for folder in self.before for path in folder.glob("*.json*")]

    def once(self, chance: random.Random) -> str:
        """Damage one file at random; "refused", "same" or "shorter", never another value.

        "shorter": a file of lines was cut, so that it reads like one whose writer was killed there. Its records are the
        first ones, unchanged, and it counts as unfinished: a run is no baseline, an A/B says that it is not all.

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
            found = _content(path.parent)
        except DataError as refusal:
            return "refused" if len(str(refusal).splitlines()) == 1 else f"several lines: {refusal}"
        before = self.before[path.parent]
        if found == before:
            return "same"
        assert "cut" in what, f"{path}, {what}: read as another value"
        assert path.suffix == ".jsonl", f"{path}, {what}: read as another value"
        assert found.manifest == before.manifest
        assert found.records == before.records[: len(found.records)], f"{path}, {what}: read as other records"
        assert not found.finished, f"{path}, {what}: counts as finished"
        return "shorter"


class Content(NamedTuple):
    """What is read from a folder."""

    manifest: object
    records: Sequence[object]
    finished: bool


def _content(folder: Path) -> Content:
    if (folder / record.MANIFEST).exists():
        return Content(*record.read(folder))
    if (folder / "manifest.json").exists():
        run = read_run(folder)
        return Content(run.manifest, turns_and_checks(run), finished=not unfinished(run))
    return Content(None, read_sessions(folder), finished=True)


def other_run(name: str) -> Run:
    """A hand-made run under another id."""
    run = make_run(CASES, rounds=2)
    return msgspec.structs.replace(run, path=name, manifest=msgspec.structs.replace(run.manifest, run_id=name))
