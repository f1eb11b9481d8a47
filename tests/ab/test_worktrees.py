"""Revisions in worktrees of their own, gone afterwards, whatever happens."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from bench.ab import worktrees
from bench.errors import UsageError


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
    monkeypatch.setattr(worktrees.tempfile, "tempdir", str(tmp_path))
    abandoned = tmp_path / f"{worktrees.PREFIX}x"
    git(repository, "worktree", "add", "--detach", str(abandoned / "tree"))
    (abandoned / worktrees.LOCK).touch()
    with worktrees.checkout(repository, worktrees.commit(repository, "main", "BASE")) as tree:
        worktrees.remove_abandoned()  # as another process would: ours is in use
        assert (tree / "file").exists()
        assert not abandoned.exists()
    assert len(git(repository, "worktree", "list").splitlines()) == 1


def test_a_worktree_of_the_users_own_is_left_alone(repository, tmp_path):
    theirs = tmp_path / "on a disk that is not there now"
    git(repository, "worktree", "add", "--detach", str(theirs))
    theirs.rename(tmp_path / "elsewhere")
    with worktrees.checkout(repository, worktrees.commit(repository, "main", "BASE")):
        pass
    assert str(theirs) in git(repository, "worktree", "list")


def test_the_working_tree_is_taken_as_it_was(repository):
    (repository / ".gitignore").write_text("ignored")
    for name in ("new", "ignored"):
        (repository / name).write_text(name)
    (repository / "link").symlink_to("new")
    git(repository, "add", "link")
    (repository / "file").write_text("changed")
    with worktrees.snapshot(repository) as tree:
        (repository / "file").write_text("later")
        assert (tree / "file").read_text() == "changed"
        assert sorted(path.name for path in tree.iterdir()) == [".gitignore", "file", "link", "new"]
        assert (tree / "link").is_symlink()
        (repository / "file").unlink()
        with worktrees.snapshot(repository) as other:
            assert not (other / "file").exists()
    assert not tree.exists()


@pytest.mark.parametrize("revision", ["nowhere", "--help", ""])
def test_no_revision_is_a_usage_error(repository, revision):
    with pytest.raises(UsageError, match="BASE"):
        worktrees.commit(repository, revision, "BASE")


def test_no_repository_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="no git repository"):
        worktrees.repository(tmp_path)


def test_the_working_tree_is_named_by_its_commit_and_by_what_changed(repository):
    sha = git(repository, "rev-parse", "HEAD")[:12]

    def name() -> str:
        with worktrees.snapshot(repository) as tree:
            return worktrees.describe(repository, tree)

    assert name() == f"working tree on {sha}, unchanged"
    (repository / "file").write_text("changed")
    changed = name()
    assert changed.startswith(f"working tree on {sha}, changed (content ")
    assert name() == changed
    (repository / "new").write_text("")
    assert (named := name()) not in {changed, f"working tree on {sha}, unchanged"}
    (repository / "link").symlink_to("/nowhere")  # as to weights on another disk
    linked = name()
    (repository / "link").unlink()
    (repository / "link").symlink_to("/nowhere/else")
    assert len({named, linked, name()}) == 3


def test_a_repository_without_a_commit_has_a_working_tree_too(tmp_path):
    git(tmp_path, "init", "-q")
    with worktrees.snapshot(tmp_path) as tree:
        assert worktrees.describe(tmp_path, tree).startswith("working tree, changed (content ")
