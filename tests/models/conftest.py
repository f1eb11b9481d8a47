"""A cache folder of its own for every test, and folders to load from."""

import huggingface_hub
import pytest

from tests.models.loading import write_gguf
from tests.tiny import ARCHITECTURES


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("KVBENCH_CACHE", str(folder))
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a tiny Llama, as save_pretrained writes it."""
    folder = tmp_path / "checkpoint"
    ARCHITECTURES["llama"]().save_pretrained(folder)
    return folder


@pytest.fixture
def no_network(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)


@pytest.fixture
def gguf_folder(tmp_path):
    folder = tmp_path / "with-gguf"
    folder.mkdir()
    write_gguf(folder / "tiny.gguf")
    return folder
