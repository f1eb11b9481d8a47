"""Checks revisions of the current repository out, each in a temporary worktree, and copies the working tree."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock

from bench.errors import UsageError

PREFIX = "kvbench-worktree-"
LOCK = "lock"


def repository(folder: Path) -> Path:
    """Find the top folder of the repository that `folder` lies in.

    Raises:
        UsageError: it lies in none, or there is no git.
    """
    try:
        return Path(_git(folder, "rev-parse", "--show-toplevel"))
    except FileNotFoundError:
        raise UsageError("BASE: two revisions are compared with git, which is not installed") from None
    except subprocess.CalledProcessError:
        raise UsageError(
            f"BASE: {folder} lies in no git repository; go to one, or compare environments (--base-python, --base-env)"
        ) from None


def commit(top: Path, revision: str, argument: str) -> str:
    """Resolve `revision` to a commit.

    Raises:
        UsageError: it names none.
    """
    try:
        return _git(top, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    except subprocess.CalledProcessError:
        hint = (
            "in a shallow clone fetch it first"
            if _git(top, "rev-parse", "--is-shallow-repository") == "true"
            else ("give a commit, a branch or a tag")
        )
        raise UsageError(f"{argument} {revision}: no such revision in {top}; {hint}") from None


@contextmanager
def checkout(top: Path, sha: str) -> Iterator[Path]:
    """Check the commit `sha` out in a worktree that is removed with the context; remove what killed processes left."""
    remove_abandoned()
    with _folder() as folder:
        tree = folder / "tree"
        try:
            try:
                _git(top, "worktree", "add", "--detach", "--quiet", str(tree), sha)
            except subprocess.CalledProcessError as error:
                raise UsageError(f"git cannot check out {sha[:12]}: {error.stderr.strip()}") from error
            yield tree
        finally:
            _forget(tree)


@contextmanager
def snapshot(top: Path) -> Iterator[Path]:
    """Copy the working tree without what git ignores, so that no later edit changes what is measured."""
    remove_abandoned()
    with _folder() as folder:
        tree = folder / "tree"
        tree.mkdir()
        for name in _git(top, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0"):
            source, target = top / name, tree / name
            if not name or not os.path.lexists(source):  # removed, but not from git's index
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir() and not source.is_symlink():  # a submodule
                shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
            else:
                shutil.copy2(source, target, follow_symlinks=False)
        yield tree


def describe(top: Path, tree: Path) -> str:
    """Name a `snapshot` of the repository `top`: its commit, and a digest of its content if that was changed."""
    try:
        on = f" on {_git(top, 'rev-parse', '--verify', '--quiet', 'HEAD')[:12]}"
    except subprocess.CalledProcessError:  # no commit yet
        on = ""
    if on and not _git(top, "status", "--porcelain", "--untracked-files=normal"):
        return f"working tree{on}, unchanged"
    digest = hashlib.sha256()
    for path in sorted(path for path in tree.rglob("*") if path.is_symlink() or path.is_file()):
        digest.update(f"{path.relative_to(tree)}\0".encode(errors="surrogateescape"))
        if path.is_symlink():  # where it leads may be no part of the tree
            digest.update(f"-> {path.readlink()}".encode(errors="surrogateescape"))
        else:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"working tree{on}, changed (content {digest.hexdigest()[:12]})"


def remove_abandoned() -> None:
    """Remove the worktrees of processes that were killed before they could do so: nobody holds their locks any more."""
    for lock in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{LOCK}"):
        with suppress(OSError), filelock.FileLock(lock, blocking=False):  # another user's, or held, or just gone
            _forget(lock.parent / "tree")
            shutil.rmtree(lock.parent, ignore_errors=True)


@contextmanager
def _folder() -> Iterator[Path]:
    """Make a temporary folder with a lock that this process holds."""
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    try:
        with filelock.FileLock(folder / f"{LOCK}.part"):
            (folder / f"{LOCK}.part").rename(folder / LOCK)  # none is ever seen under its name without being held
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _forget(tree: Path) -> None:
    """Have git remove the worktree `tree` and its record, and no other; an error here must not hide an earlier one."""
    if (tree / ".git").is_file():
        with suppress(OSError, subprocess.CalledProcessError):
            common = _git(tree, "rev-parse", "--git-common-dir")
            # Twice: a worktree that git was killed while making is locked.
            _git(Path(common), "worktree", "remove", "--force", "--force", str(tree))


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()
