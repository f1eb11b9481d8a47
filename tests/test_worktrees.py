"""Revisions in worktrees of their own, gone afterwards, whatever happens."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from bench import worktrees
from bench.case import UsageError


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *words], check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture
def repository(tmp_path):
    git(tmp_path, "init", "-q", "-b", "main")
    for text in ("one", "two"):
        (tmp_path / "file").write_text(text)
        git(tmp_path, "add", "file")
        git(tmp_path, "commit", "-q", "-m", text)
    return tmp_path


def test_a_revision_is_checked_out_beside_the_working_tree_and_removed(repository):
    (repository / "file").write_text("changed")
    sha = worktrees.commit(repository, "HEAD~1", "BASE")
    with worktrees.checkout(repository, sha) as tree:
        assert (tree / "file").read_text() == "one"
        assert (repository / "file").read_text() == "changed"
    assert not tree.parent.exists()
    assert len(git(repository, "worktree", "list").splitlines()) == 1


def test_it_is_removed_after_an_error_too(repository):
    with pytest.raises(KeyboardInterrupt), worktrees.checkout(repository, worktrees.commit(repository, "main", "BASE")):
        raise KeyboardInterrupt
    assert len(git(repository, "worktree", "list").splitlines()) == 1


def test_what_a_killed_process_left_is_removed(repository, tmp_path, monkeypatch):
    monkeypatch.setattr(worktrees.tempfile, "gettempdir", lambda: str(tmp_path))
    abandoned = tmp_path / f"{worktrees.PREFIX}{2**22 + 1}-x"
    git(repository, "worktree", "add", "--detach", str(abandoned / "tree"))
    worktrees.remove_abandoned(repository)
    assert not abandoned.exists()
    assert len(git(repository, "worktree", "list").splitlines()) == 1


@pytest.mark.parametrize("revision", ["nowhere", "--help", ""])
def test_no_revision_is_a_usage_error(repository, revision):
    with pytest.raises(UsageError, match="BASE"):
        worktrees.commit(repository, revision, "BASE")


def test_no_repository_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="no git repository"):
        worktrees.repository(tmp_path)
