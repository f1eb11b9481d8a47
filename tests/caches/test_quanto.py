"""quanto's extension: a lock that a killed compiler left behind holds nobody up."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvcache.caches import quanto
from kvcache.caches.contract import Unsupported

pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed: pip install 'kvbench[quantized]'")


@pytest.fixture
def extension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """An extension that is being built in a folder of the test's own."""
    found = SimpleNamespace(build_directory=str(tmp_path), lib="built")
    monkeypatch.setattr("optimum.quanto.library.extensions.extension.get_extension", lambda _: found)
    quanto.build_extension.cache_clear()
    yield found
    quanto.build_extension.cache_clear()


def test_a_lock_that_was_left_behind_is_removed(extension: SimpleNamespace, tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    for path in (lock, tmp_path):
        os.utime(path, (1.0, 1.0))
    quanto.build_extension()
    assert not lock.exists()


def test_a_build_that_goes_on_is_waited_for(
    extension: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            lock.unlink()

    monkeypatch.setattr(quanto.time, "sleep", wait)
    quanto.build_extension()
    assert len(waits) == 3


def test_what_cannot_be_compiled_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        build_directory = str(tmp_path)

        @property
        def lib(self) -> None:
            raise RuntimeError("Ninja is required\nmore")

    monkeypatch.setattr("optimum.quanto.library.extensions.extension.get_extension", lambda _: Broken())
    quanto.build_extension.cache_clear()
    with pytest.raises(Unsupported, match=r"cannot compile its extension here: Ninja is required$"):
        quanto.build_extension()
