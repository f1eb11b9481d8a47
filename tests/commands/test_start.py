"""The program `kvbench` where PYTHONPATH has other modules of the names that it needs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commandline import ROOT, refused
from tests.untraced import untraced_variables


def started(path: str, here: Path) -> subprocess.CompletedProcess[str]:
    """Start it as its console script does, with the folders of `path` before its own.

    Unmeasured: coverage would import the modules that are hidden here, before anything of ours runs.
    """
    return subprocess.run(
        [sys.executable, "-P", "-c", "from kvbench import main; main()", "report", "x"],
        env=untraced_variables() | {"PYTHONPATH": f"{path}:{ROOT}"},
        cwd=here,
        capture_output=True,
        text=True,
        check=False,
    )


def test_another_bench_or_kvcache_does_not_hide_ours(tmp_path: Path) -> None:
    (tmp_path / "bench").mkdir()
    for file in ("bench/__init__.py", "kvcache.py"):
        (tmp_path / file).write_text("raise RuntimeError('not kvbench')")
    done = started(str(tmp_path), tmp_path)
    assert "kvbench: x: no run folder" in done.stderr
    assert done.returncode == 3


@pytest.mark.parametrize("by_name", [True, False])
def test_a_file_that_hides_pythons_own_module_is_named(by_name: bool, tmp_path: Path) -> None:
    (tmp_path / "tomllib").mkdir()
    for file in ("random.py", "tomllib/other.py", "mine.py"):
        (tmp_path / file).write_text("MINE = 1\n")
    done = started(str(tmp_path) if by_name else "", tmp_path)
    file = f"{tmp_path}/random.py" if by_name else "random.py"
    assert done.stderr.startswith("kvbench: cannot start: ")
    assert done.stderr.endswith(f"; {file} hides Python's own module random: rename it, or change PYTHONPATH\n")
    assert done.returncode == 2


def test_what_cannot_be_imported_is_no_regression(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise MemoryError")
    done = started(str(tmp_path), tmp_path)
    line = "kvbench: cannot start: MemoryError; set KVBENCH_TRACEBACK=1 to see where\n"
    assert (done.returncode, done.stderr) == (2, line)


def test_a_hidden_module_that_is_imported_late_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.cli.app", lambda *_, **__: os.no_such_name)
    assert "AttributeError" in refused("env", code=5)
    (tmp_path / "queue").mkdir()
    (tmp_path / "queue" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'nowhere'}:{tmp_path}")
    assert f"{tmp_path}/queue hides Python's own module queue" in refused("env", code=2)
    for answer in (lambda: None, lambda: 1 / 0):  # it may be that there is no memory to look for the reason
        monkeypatch.setattr("tests.commandline.hidden", answer)
        assert "AttributeError" in refused("env", code=5)
