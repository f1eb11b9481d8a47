"""The cache folder: made once by processes at the same time, whole or not at all."""

from pathlib import Path

import pytest

from kvcache.models import (
    ModelError,
    load,
)
from kvcache.models.weight_cache import find, made_once
from tests.models.loading import python, refusal

MAKE = """
import os, sys, time
from pathlib import Path
from kvcache.models.weight_cache import made_once

def make(folder):
    (folder / "weights").write_text(str(os.getpid()))
    print("making", flush=True)
    time.sleep(float(sys.argv[1]))

made = made_once("name", make, note="making")
print((made / "weights").read_text())
"""


def test_processes_at_once_make_it_once_and_leave_no_lock(cache):
    processes = [python(MAKE, 0.3) for _ in range(4)]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, outputs
    lines = [output.splitlines() for output, _ in outputs]
    assert sum("making" in line for line in lines) == 1
    assert len({line[-1] for line in lines}) == 1
    assert [path.name for path in cache.iterdir()] == ["name"]


def test_a_killed_maker_leaves_nothing_that_counts(cache):
    process = python(MAKE, 60)
    assert process.stdout is not None
    assert process.stdout.readline() == "making\n"
    process.kill()
    process.communicate()
    assert find("name") is None
    folder = made_once("name", lambda target: (target / "other").touch(), note="making again")
    assert find("name") == folder
    assert (folder / "other").exists()
    assert not (folder / "weights").exists()
    assert not (cache / "name.part").exists()


@pytest.mark.parametrize("damage", ["shorter", "gone", "marker"])
def test_damaged_copy_is_made_again(damage):
    def make(target: Path) -> None:
        (target / "weights").write_text("0123456789")

    folder = made_once("name", make, note="making")
    if damage == "shorter":
        (folder / "weights").write_text("0123")
    elif damage == "gone":
        (folder / "weights").unlink()
    else:
        (folder / "kvbench-complete-2.json").write_text("{")
    assert find("name") is None
    assert made_once("name", make, note="making") == folder
    assert (find("name") / "weights").read_text() == "0123456789"


def test_failed_making_leaves_nothing(cache):
    def fail(target: Path) -> None:
        (target / "weights").touch()
        raise ModelError("no")

    refusal(made_once, "name", fail, note="making")
    assert list(cache.iterdir()) == []


def test_cache_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path / "file"))
    message = refusal(load, "random:tiny")
    assert str(tmp_path / "file") in message
    assert "set KVBENCH_CACHE" in message
