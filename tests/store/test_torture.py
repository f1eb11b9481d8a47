"""No kill loses stored data, no damage is read as another value. The study store_torture does far more."""

import os
import random
import shutil
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench.errors import UsageError
from bench.judge.baseline import promote
from bench.store import job_files
from bench.store.run_folder import locked, read_run, samples_file
from bench.store.sessions import read_sessions
from tests import stub_run
from tests.cluster import ROUNDS, make_cluster_run, node, write_attempt
from tests.commandline import kvbench, refused
from tests.handmade import make_run
from tests.stored import create_run
from tests.torture import CASES, Damaged, kill_a_writer, other_run, store


def test_a_killed_writer_loses_no_finished_turn(tmp_path: Path) -> None:
    chance = random.Random(0)  # noqa: S311
    for number in range(8):
        finished, stored = kill_a_writer(tmp_path / str(number), chance)
        assert finished <= stored <= finished + 1


def test_no_damage_is_accepted_as_another_value(tmp_path: Path) -> None:
    chance, target = random.Random(0), Damaged(tmp_path)  # noqa: S311
    told = [target.once(chance) for _ in range(150)]
    assert told.count("refused") > 75


def test_two_writers_at_once_each_have_a_file(tmp_path: Path) -> None:
    run = make_run(CASES, rounds=4)
    folder, manifest = create_run(tmp_path, run.manifest)
    halves = run.samples[::2], run.samples[1::2]

    def write(samples: list) -> None:
        with samples_file(folder, manifest.digest) as writer:
            for sample in samples:
                writer.append(sample)

    threads = [threading.Thread(target=write, args=(half,)) for half in halves]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(sample.order for sample in read_run(folder).samples) == list(range(len(run.samples)))


def test_a_run_is_locked_by_one_process_until_it_ends_however_it_ends(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with locked(tmp_path):
            os.write(writing, b".")
            signal.pause()
    os.read(reading, 1)
    with pytest.raises(UsageError, match="another process measures into it"), locked(tmp_path):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with locked(tmp_path):
        with pytest.raises(UsageError, match="another process measures into it"), locked(tmp_path):
            pass
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


def test_two_promotions_at_once_are_two_sessions(tmp_path: Path) -> None:
    runs = [other_run(f"run-{number}") for number in range(6)]
    threads = [threading.Thread(target=promote, args=(run, tmp_path, "b")) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_sessions(tmp_path / "b")) == 6


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_what_was_stored(small_disk: Path) -> None:
    run = make_run(CASES, rounds=3)
    promote(run, small_disk / "baselines", "b")
    folder, manifest = create_run(small_disk / "runs", run.manifest)
    stored = 0
    with pytest.raises(OSError, match="No space left"), samples_file(folder, manifest.digest) as writer:  # noqa: PT012
        while True:
            writer.append(run.samples[stored % len(run.samples)])
            stored += 1
    back = read_run(folder)
    assert len(back.samples) == stored > 0
    with pytest.raises(UsageError, match="No space left"):
        promote(other_run("late"), small_disk / "baselines", "b")
    assert [session.run_id for session in read_sessions(small_disk / "baselines" / "b")] == ["handmade"]
    assert len(list((small_disk / "baselines" / "b").iterdir())) == 1


@contextmanager
def filled(folder: Path, but: int) -> Iterator[None]:
    """Leave `but` bytes of a file system free."""
    filler = folder / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(folder).free - but))
    yield
    filler.unlink()


def test_a_job_on_a_full_disk_is_one_line_and_goes_on_where_there_is_room(small_disk: Path, tmp_path: Path) -> None:
    folder, _ = make_cluster_run(small_disk / "runs")
    job = ["job", str(job_files.path_of(folder, "job-0"))]
    with filled(small_disk, but=8192):
        code, _, errors = stub_run.finish(job, tmp_path)
    assert code == 5
    (complaint,) = [line for line in errors.splitlines() if "No space left on device" in line]
    assert complaint == errors.splitlines()[-1]
    assert f"kvbench run --resume {folder}" in complaint
    assert "Traceback" not in errors
    kept = read_run(folder).samples
    assert len(kept) > 0
    code, _, errors = stub_run.finish(job, tmp_path)
    assert code == 0, errors
    measured = read_run(folder).samples
    assert all(sample in measured for sample in kept)
    counted = Counter((sample.case, sample.round) for sample in measured if not sample.warmup)
    assert set(counted.values()) == {1}
    assert len(counted) == 2 * 2 * ROUNDS


def test_collecting_onto_a_full_disk_is_one_line_and_can_be_repeated(small_disk: Path, tmp_path: Path) -> None:
    folder, _ = make_cluster_run(small_disk / "runs")
    node1 = Path(shutil.copytree(folder, tmp_path / "node1"))
    write_attempt(node1, node("node1"), "a")
    before = (node1 / "samples-job-0.jsonl").read_bytes()
    assert len(before) > 8192
    collect = ["collect", str(node1), "--out", str(small_disk / "runs")]
    with filled(small_disk, but=4096):
        assert "No space left on device" in refused(*collect)
    assert (node1 / "samples-job-0.jsonl").read_bytes() == before
    kvbench(*collect)
    assert (folder / "samples-job-0.jsonl").read_bytes() == before
    assert [path.name for path in folder.glob("samples*")] == ["samples-job-0.jsonl"]


def test_a_read_only_folder_is_refused_in_one_line(small_disk: Path) -> None:
    folder = store(make_run(CASES, rounds=2), small_disk / "runs")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UsageError, match="Read-only"):
        create_run(small_disk / "more", make_run(CASES).manifest)
    with pytest.raises(UsageError, match="Read-only"):
        samples_file(folder, "digest")
    with pytest.raises(UsageError, match="Read-only"):
        promote(other_run("x"), small_disk / "baselines", "b")
    assert read_run(folder).samples
