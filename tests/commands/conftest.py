"""What the tests of several commands share: one real run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commandline import kvbench

STRATEGIES = ["naive", "dynamic", "static", "hf-generate"]  # compiled would take its time
TINY = ["-m", "random:tiny", "-t", "1", "-p", "8,16", "-n", "4", "-r", "6", "--strategies", ",".join(STRATEGIES)]


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of the tiny model with all strategies."""
    out = tmp_path_factory.mktemp("runs")
    done = kvbench("run", *TINY, "--out", str(out), "--name", "one")
    folder = Path(done.stdout.strip().splitlines()[-1])
    assert folder.parent == out
    return folder
