"""Folders that this user may not search, as root's after `sudo -u`. Root may search all, so here `os.stat` refuses."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.errors import UsageError
from bench.store.run_folder import make_folder
from tests.commandline import ROOT, kvbench, refused


@pytest.fixture
def dark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder, stat = tmp_path / "dark", os.stat

    def refusing(path: object, *arguments: object, **named: object) -> os.stat_result:
        if str(path).startswith(f"{folder}/") or str(path) == "pyproject.toml":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", refusing)
    return folder


def test_a_folder_for_runs_that_may_not_be_searched_is_refused(dark: Path) -> None:
    with pytest.raises(UsageError, match=r"--out .*/dark/runs: cannot be written \(Permission denied\)"):
        make_folder(dark / "runs", "mine")


def test_baselines_that_may_not_be_searched_are_refused(dark: Path, run_folder: Path) -> None:
    line = refused("gate", str(run_folder), "--baseline", str(dark / "mine"), code=3)
    assert line == f"kvbench: --baseline {dark}/mine: cannot be read (Permission denied)\n"
    line = refused("baseline", "promote", str(run_folder), "--baseline-dir", str(dark / "mine"), "--name", "a")
    assert "/dark/mine: cannot be written (Permission denied)" in line


def test_a_current_folder_that_may_not_be_searched_has_no_settings(dark: Path) -> None:
    assert "cases" in kvbench("run", "-m", "random:tiny", "--strategies", "naive", "-t", "1", "--dry-run").stdout


def test_plots_ask_for_no_settings_in_such_a_folder() -> None:
    code = "import os, pathlib; pathlib.Path.exists = lambda _: 1 / 0; import bench.tell.plots"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
