"""What the tests of several commands share: one real run, one made by hand, and plots that are not written."""

from pathlib import Path

import pytest

from bench.tell.page.svg import Picture
from bench.tell.plots.style import Drawn
from tests.commandline import STRATEGIES, TINY, kvbench
from tests.handmade import grid, make_run
from tests.once import made_once
from tests.torture import store


@pytest.fixture(scope="session")
def real_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of the tiny model with all strategies, made once for all processes of pytest-xdist; read only."""

    def measure(out: Path) -> None:
        done = kvbench("run", *TINY, "--out", str(out), "--name", "one")
        assert Path(done.stdout.strip().splitlines()[-1]).parent == out

    (folder,) = made_once(tmp_path_factory, "real-run", measure).glob("*-one")
    return folder


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run made by hand with as many cases; nothing is derived from it yet."""
    return store(make_run(grid(STRATEGIES, [8, 16], n_gen=4)), tmp_path_factory.mktemp("runs"))


@pytest.fixture
def unsaved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw plots, but write no file of them: that takes far longer than all else that a command does."""
    monkeypatch.setattr("bench.tell.plots.style.drawn", lambda _: Drawn(png=b"", svg=""))
    monkeypatch.setattr("bench.tell.plots.style.write", lambda figure, path: [])
    monkeypatch.setattr("bench.tell.page.svg.picture", lambda _, name, *__: Picture(title=name, svg="<svg></svg>"))
