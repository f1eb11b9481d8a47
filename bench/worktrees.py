"""Revisions of the current repository, each checked out in a temporary worktree of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from bench.case import UsageError

PREFIX = "kvbench-worktree-"


def repository(folder: Path) -> Path:
    """The top folder of the repository that `folder` lies in.

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
    """The commit that `revision` names.

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
    """A worktree of the commit `sha`, gone when the context ends. What killed processes left is removed, too."""
    remove_abandoned(top)
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
    try:
        try:
            _git(top, "worktree", "add", "--detach", "--quiet", str(folder / "tree"), sha)
        except subprocess.CalledProcessError as error:
            raise UsageError(f"git cannot check out {sha[:12]}: {error.stderr.strip()}") from error
        yield folder / "tree"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _git(top, "worktree", "prune")


def remove_abandoned(top: Path) -> None:
    """Remove the worktrees of processes that were killed before they could."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*-*"):
        owner = folder.name.removeprefix(PREFIX).partition("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)) and folder.stat().st_uid == os.getuid():
            shutil.rmtree(folder, ignore_errors=True)
    _git(top, "worktree", "prune")


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()
