"""Revisions in worktrees of their own, gone afterwards, whatever happens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.ab import worktrees
from bench.errors import UsageError
from bench.machine.git import LEAKED
from bench.measure.server_process import TREE


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "protocol.file.allow=always"]
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


# --- what a hook, a container or a clone does to git -----------------------------------------------------------------


def stored(repository: Path) -> dict[str, bytes]:
    """Every file of a repository, its working tree and what git keeps of it."""
    return {str(path): path.read_bytes() for path in repository.rglob("*") if path.is_file()}


def content(tree: Path) -> dict[str, str]:
    return {path.relative_to(tree).as_posix(): path.read_text() for path in tree.rglob("*") if path.is_file()}


def both(top: Path, revision: str = "HEAD~1") -> tuple[dict[str, str], dict[str, str]]:
    """What base and head would run; the user's repository is as it was afterwards, and nothing else is left."""
    before = stored(top)
    found = worktrees.repository(top)
    with (
        worktrees.checkout(found, worktrees.commit(found, revision, "BASE")) as base,
        worktrees.snapshot(found) as head,
    ):
        worktrees.describe(found, head)
        trees = content(base), content(head)
        assert stored(top) == before
    assert stored(top) == before
    assert not base.parent.exists()
    assert not head.parent.exists()
    return trees


@pytest.fixture
def other(tmp_path_factory):
    """Another repository, that an environment variable leads to."""
    folder = tmp_path_factory.mktemp("other")
    git(folder, "init", "-q")
    (folder / "other").write_text("other")
    git(folder, "add", "other")
    git(folder, "commit", "-q", "-m", "other")
    return folder


@pytest.mark.parametrize(
    "leak",
    [
        {"GIT_DIR": ".git"},
        {"GIT_DIR": ".git", "GIT_WORK_TREE": "."},
        {"GIT_INDEX_FILE": ".git/index"},
        {"GIT_OBJECT_DIRECTORY": ".git/objects"},
        {"GIT_WORK_TREE": "."},
        {"GIT_COMMON_DIR": ".git"},
        {"GIT_DIR": ".git", "GIT_INDEX_FILE": ".git/next-index-1.lock", "GIT_PREFIX": ""},  # of `git commit FILE`
        {"GIT_DIR": "nowhere"},
    ],
    ids="+".join,
)
def test_leaked_variables_lead_to_no_other_repository(repository, other, leak, monkeypatch):
    for name, value in leak.items():
        monkeypatch.setenv(name, str(other / value) if value else value)
    theirs = stored(other)
    (repository / "file").write_text("changed")
    assert both(repository) == ({"file": "one"}, {"file": "changed"})
    assert stored(other) == theirs


def test_git_itself_lists_what_is_cleaned():
    listed = set(git(Path.cwd(), "rev-parse", "--local-env-vars").split())
    assert listed - {"GIT_CONFIG_COUNT", "GIT_CONFIG_PARAMETERS"} <= set(LEAKED)


def test_in_a_hook_of_git_the_repository_is_the_hooks_own(repository, tmp_path_factory):
    """The whole way: `git commit` runs a hook, with its variables, and the hook asks for both trees."""
    report = tmp_path_factory.mktemp("report")
    (report / "hook.py").write_text(
        "import json, sys; from pathlib import Path; from tests.ab.test_worktrees import both; "
        "Path(sys.argv[1]).write_text(json.dumps(both(Path.cwd())))"
    )
    hook = repository / ".git" / "hooks" / "pre-commit"
    command = f"PYTHONPATH={TREE} exec {sys.executable} {report / 'hook.py'} {report / 'trees.json'}"
    hook.write_text(f"#!/bin/sh\n{command}\n")
    hook.chmod(0o755)
    (repository / "file").write_text("three")
    git(repository, "commit", "-q", "-m", "three", "file")
    assert json.loads((report / "trees.json").read_text()) == [{"file": "one"}, {"file": "three"}]
    assert git(repository, "status", "--porcelain") == ""


def test_no_hook_runs(repository):
    for name in ("post-checkout", "post-index-change", "reference-transaction", "fsmonitor-watchman"):
        hook = repository / ".git" / "hooks" / name
        hook.write_text(f"#!/bin/sh\necho {name} >&2\ntouch {repository}/ran\nexit 1\n")
        hook.chmod(0o755)
    git(repository, "config", "core.fsmonitor", str(repository / ".git/hooks/fsmonitor-watchman"))
    assert both(repository) == ({"file": "one"}, {"file": "two"})


def test_a_required_filter_that_is_not_installed_is_named(repository):
    (repository / ".gitattributes").write_text("weights filter=lfs\n")
    (repository / "weights").write_text("w")
    git(repository, "add", ".")
    git(repository, "commit", "-q", "-m", "weights")
    for name in ("clean", "smudge", "process"):
        git(repository, "config", f"filter.lfs.{name}", f"kvbench-no-such-filter {name}")
    git(repository, "config", "filter.lfs.required", "true")
    before = stored(repository)
    with (
        pytest.raises(UsageError, match=r"git cannot check out \w+: .*kvbench-no-such-filter") as refused,
        worktrees.checkout(repository, worktrees.commit(repository, "HEAD", "BASE")),
    ):
        pass
    assert "\n" not in str(refused.value)
    assert stored(repository) == before


def test_a_repository_of_another_user_is_refused_in_gits_own_words(repository, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own tests set it
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    with pytest.raises(UsageError, match=r"^BASE: .*dubious ownership.*safe\.directory") as refused:
        worktrees.repository(repository)
    assert "\n" not in str(refused.value)
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "safe.directory")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "*")
    assert both(repository) == ({"file": "one"}, {"file": "two"})


def test_a_shallow_clone_judges_its_one_revision_and_says_how_to_get_others(repository, tmp_path_factory):
    clone = tmp_path_factory.mktemp("clones") / "shallow"
    git(repository, "clone", "-q", "--depth=1", f"file://{repository}", str(clone))
    (clone / "file").write_text("changed")
    assert both(clone, "HEAD") == ({"file": "two"}, {"file": "changed"})
    with pytest.raises(UsageError, match="git fetch --unshallow"):
        worktrees.commit(clone, "HEAD~1", "BASE")


def test_a_partial_clone_fetches_beside_the_users_repository(repository, tmp_path_factory):
    clone = tmp_path_factory.mktemp("clones") / "partial"
    git(repository, "config", "uploadpack.allowFilter", "true")
    git(repository, "clone", "-q", "--filter=blob:none", f"file://{repository}", str(clone))
    assert both(clone) == ({"file": "one"}, {"file": "two"})


@pytest.mark.parametrize("recurse", ["false", "true"])
def test_submodules_are_in_both_trees(repository, other, recurse):
    """Each at the commit that its revision names; within one, it is the repository."""
    git(repository, "config", "submodule.recurse", recurse)
    git(repository, "submodule", "--quiet", "add", str(other), "sub/other")
    git(repository, "commit", "-q", "-m", "submodule")
    inner = repository / "sub" / "other"
    (inner / "other").write_text("newer")
    git(inner, "commit", "-q", "-a", "-m", "newer")
    (inner / "other").write_text("changed")
    (inner / ".gitignore").write_text("ignored")
    (inner / "ignored").touch()
    base, head = both(repository, "HEAD")
    assert (base["sub/other/other"], head["sub/other/other"]) == ("other", "changed")
    assert set(base) == {"file", ".gitmodules", "sub/other/other"}
    assert set(head) == {*base, "sub/other/.gitignore"}
    assert both(inner)[0] == {"other": "other"}


def test_a_submodule_whose_commit_is_not_here_is_named(repository, other):
    git(repository, "submodule", "--quiet", "add", str(other), "sub")
    git(repository, "update-index", "--cacheinfo", f"160000,{'1' * 40},sub")
    git(repository, "commit", "-q", "-m", "of another machine")
    with pytest.raises(UsageError, match=r"submodule sub: .*git fetch"):
        both(repository, "HEAD")
    git(repository, "submodule", "deinit", "--force", "--quiet", "sub")
    assert "file" in both(repository, "HEAD")[0]  # one that the user does not have is missing in both


def test_a_sparse_checkout_is_sparse_on_both_sides(repository):
    for name in ("in", "out"):
        (repository / name).mkdir()
        (repository / name / "file").write_text(name)
    git(repository, "add", ".")
    git(repository, "commit", "-q", "-m", "folders")
    git(repository, "sparse-checkout", "set", "in")
    assert both(repository, "HEAD") == ({"file": "two", "in/file": "in"},) * 2


def test_names_with_spaces_umlauts_and_newlines(tmp_path):
    top = tmp_path / " a folder\u00fc"
    top.mkdir()
    git(top, "init", "-q")
    (top / "a\nfile ").write_text("one")
    git(top, "add", ".")
    git(top, "commit", "-q", "-m", "one")
    assert both(top, "HEAD") == ({"a\nfile ": "one"},) * 2


def test_a_worktree_of_the_user_and_a_split_index(repository, tmp_path_factory):
    linked = tmp_path_factory.mktemp("worktrees") / "linked"
    git(repository, "worktree", "add", "-q", "--detach", str(linked))
    git(linked, "update-index", "--split-index")
    before = stored(repository)
    assert both(linked)[0]["file"] == "one"
    assert stored(repository) == before


def test_a_file_in_conflict_is_taken_as_it_lies_there(repository):
    git(repository, "checkout", "-q", "-b", "side", "HEAD~1")
    (repository / "file").write_text("side")
    git(repository, "commit", "-q", "-a", "-m", "side")
    with pytest.raises(subprocess.CalledProcessError):
        git(repository, "merge", "-q", "main")
    assert both(repository, "main")[1]["file"] == (repository / "file").read_text()


def test_an_ambiguous_revision_is_not_called_missing(repository, monkeypatch):
    monkeypatch.setattr(
        worktrees, "git", lambda *_: (_ for _ in ()).throw(worktrees.GitFailed("short object ID 12ab is ambiguous"))
    )
    with pytest.raises(UsageError, match="BASE 12ab: short object ID 12ab is ambiguous"):
        worktrees.commit(repository, "12ab", "BASE")


def test_a_repository_without_a_working_tree_is_refused(repository, tmp_path_factory):
    bare = tmp_path_factory.mktemp("bare")
    git(bare, "clone", "-q", "--bare", str(repository), str(bare / "it"))
    with pytest.raises(UsageError, match="must be run in a work tree"):
        worktrees.repository(bare / "it")


def test_without_git_it_is_said(repository, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match="git cannot be started"):
        worktrees.repository(repository)


def test_traces_of_git_are_no_reason(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("GIT_TRACE", "1")
    with pytest.raises(UsageError, match="lies in no git repository"):
        worktrees.repository(tmp_path_factory.mktemp("none"))


def test_a_repository_whose_files_are_elsewhere_is_refused(repository, tmp_path_factory):
    git(repository, "config", "core.worktree", str(tmp_path_factory.mktemp("files")))
    with pytest.raises(UsageError, match=r"BASE: core\.worktree says"):
        worktrees.repository(repository)


def test_what_the_repository_lacks_is_not_said_of_tmpdir(repository):
    blob = git(repository, "rev-parse", "HEAD~1:file").strip()
    (repository / ".git" / "objects" / blob[:2] / blob[2:]).unlink()
    with pytest.raises(UsageError, match=r"^git cannot check out .*unable to read"):
        both(repository)
    (repository / "file").unlink()
    os.mkfifo(repository / "file")
    with pytest.raises(UsageError, match="file` is a named pipe"), worktrees.snapshot(repository):
        pass
    (repository / ".git" / "index").write_bytes(b"x" * 50)
    with pytest.raises(UsageError, match=r"^git cannot list .*index file corrupt"), worktrees.snapshot(repository):
        pass


def test_a_file_that_cannot_be_read_is_named_and_not_tmpdir(repository, monkeypatch):
    def unreadable(source, *_, **__):
        raise PermissionError(13, "Permission denied", str(source))

    monkeypatch.setattr("shutil.copy2", unreadable)
    with pytest.raises(UsageError, match=r"^\S+file: cannot be read \(Permission denied\)"):
        both(repository)
