"""A sealed document: what is written is read, an optional field may come later, and nothing else passes."""

import os
import stat

import msgspec
import pytest

from bench.errors import DataError
from bench.store import sealed
from kvcache.files import write_atomically


class Note(msgspec.Struct, frozen=True, kw_only=True):
    schema_version: int = 2
    text: str
    share: float = 0.25
    digest: str = ""


class LaterNote(Note, frozen=True, kw_only=True):
    author: str | None = None


@pytest.fixture
def note(tmp_path):
    path = tmp_path / "note.json"
    sealed.write(path, sealed.sealed(Note(text="ä")))
    return path


def test_what_is_written_is_read_and_nothing_else_is_left(note):
    assert sealed.read(note, Note, 2) == sealed.sealed(Note(text="ä"))
    assert [path.name for path in note.parent.iterdir()] == ["note.json"]


def test_a_link_a_pipe_and_a_device_stay_what_they_are(tmp_path):
    link, pipe, device = tmp_path / "link", tmp_path / "pipe", tmp_path / "device"
    (tmp_path / "real").write_text("before")
    link.symlink_to("real")
    device.symlink_to("/dev/null")
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    for path in (link, pipe, device):
        write_atomically(path, b"after")
    assert os.read(reader, 100) == b"after"
    os.close(reader)
    assert (tmp_path / "real").read_bytes() == b"after"
    assert link.is_symlink()
    assert pipe.is_fifo()
    assert device.is_char_device()
    assert len(list(tmp_path.iterdir())) == 4
    with pytest.raises(IsADirectoryError):
        write_atomically(tmp_path, b"")


def test_its_rights_are_those_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "note", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "note").stat().st_mode) == 0o640


def test_a_seal_holds_after_the_form_gained_an_optional_field(note):
    assert sealed.read(note, LaterNote, 2).author is None


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("0.25", "0.26", "its digest does not fit"),
        ('"text"', '"test"', "damaged"),
        ("{", "[", "damaged"),
        ("ä", "", "its digest does not fit"),
        (': "ä"', ": 5", "damaged"),
    ],
)
def test_what_was_changed_is_refused(note, old, new, reason):
    note.write_text(note.read_text().replace(old, new, 1))
    with pytest.raises(DataError, match=reason):
        sealed.read(note, Note, 2)


@pytest.mark.parametrize(("version", "reason"), [(1, "schema 2 is newer .* upgrade"), (3, "schema 2 is older")])
def test_another_version_is_refused(note, version, reason):
    with pytest.raises(DataError, match=reason):
        sealed.read(note, Note, version)


def test_a_missing_document_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.json: No such file"):
        sealed.read(tmp_path / "none.json", Note, 2)
