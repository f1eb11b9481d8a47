"""Puts revisions and the working tree of a repository into temporary folders; git records nothing of them."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.errors import UsageError
from bench.machine.git import GitFailed, git
from bench.machine.places import temporary_folder

CANNOT_WRITE = ("unable to write", "unable to create", "cannot create directory")
"""What git says of a folder without room, and little more."""

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Errors of the folder that is copied to, even where they name the file that is read."""

SUBMODULE = "160000"
"""The mode under which git lists a submodule."""


def repository(folder: Path) -> Path:
    """Find the top folder of the repository that `folder` lies in.

    Raises:
        UsageError: it lies in none, git refuses it, or there is no git.
    """
    try:
        top = Path(git(folder, "rev-parse", "--show-toplevel"))
    except GitFailed as error:
        if str(error).startswith("not a git repository"):
            raise UsageError(
                f"BASE: {folder} lies in no git repository; go to one, or compare environments "
                "(--base-python, --base-env)"
            ) from None
        raise UsageError(f"BASE: two revisions are compared with git, which refuses {folder}: {error}") from None
    if not folder.is_relative_to(top) or not (top / ".git").exists():
        raise UsageError(
            f"BASE: core.worktree says that the files of {folder}'s repository are in {top}; such a repository cannot "
            "be compared"
        )
    return top


def commit(top: Path, revision: str, argument: str) -> str:
    """Resolve `revision` to a commit; raises UsageError where it names none."""
    try:
        return git(top, "rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}")
    except GitFailed as error:
        if "ambiguous" in str(error):
            raise UsageError(f"{argument} {revision}: {error}") from None
        hint = "give a commit, a branch or a tag"
        if git(top, "rev-parse", "--is-shallow-repository") == "true":
            hint = "this clone is shallow: `git fetch --unshallow` gets all revisions"
        raise UsageError(f"{argument} {revision}: no such revision in {top}; {hint}") from None


@contextmanager
def checkout(top: Path, sha: str) -> Iterator[Path]:
    """Check the commit `sha` out into a folder that is removed with the context.

    Neither the index nor anything else of the repository is written.

    Raises:
        UsageError: git cannot check it out: a filter is not installed, or a submodule's commit was not fetched.
    """
    with temporary_folder() as folder:
        try:
            _check_out(top, sha, folder / "tree", folder / "index")
        except OSError as error:
            raise _no_room(folder, error) from error
        except GitFailed as error:
            if any(words in str(error) for words in CANNOT_WRITE):
                raise _no_room(folder, error) from error
            raise UsageError(f"git cannot check out {sha[:12]}: {error}") from error
        yield folder / "tree"


def _check_out(repository: Path, sha: str, tree: Path, index: Path) -> None:
    """Write the files of `sha` into `tree`, by an index of its own; submodules too where the user has them.

    As in the user's working tree, a sparse checkout stays sparse and filters are applied. What a partial clone lacks is
    fetched to a folder beside the index.
    """
    tree.mkdir(parents=True, exist_ok=True)
    folder = git(repository, "rev-parse", "--absolute-git-dir")
    objects = repository / git(repository, "rev-parse", "--git-path", "objects")
    own = [f"--git-dir={folder}", f"--work-tree={tree}"]
    variables = {
        "GIT_INDEX_FILE": str(index),
        "GIT_OBJECT_DIRECTORY": f"{index}.objects",
        "GIT_ALTERNATE_OBJECT_DIRECTORIES": json.dumps(str(objects), ensure_ascii=False),  # quoted
    }
    Path(variables["GIT_OBJECT_DIRECTORY"]).mkdir()
    git(tree, *own, "read-tree", "--reset", "-u", sha, variables=variables)
    entries = git(tree, *own, "ls-files", "-z", "--stage", variables=variables).split("\0")
    for number, entry in enumerate(entries):
        facts, _, name = entry.partition("\t")
        if facts.startswith(SUBMODULE) and (repository / name / ".git").exists():
            inner = facts.split()[1]
            try:
                _check_out(repository / name, inner, tree / name, index.with_name(f"{index.name}.{number}"))
            except GitFailed as error:
                raise GitFailed(f"submodule {name}: {error}; `git submodule update` or `git fetch` there") from None


@contextmanager
def snapshot(top: Path) -> Iterator[Path]:
    """Copy the working tree without what git ignores, so that no later edit changes what is measured."""
    with temporary_folder() as folder:
        try:
            _copy(top, folder / "tree")
        except shutil.SpecialFileError as error:
            raise UsageError(f"the working tree of {top} cannot be copied: {error}") from error
        except OSError as error:
            reading = error.errno not in NO_ROOM and error.filename is not None
            if reading and Path(error.filename).is_relative_to(top):
                raise UsageError(f"{error.filename}: cannot be read ({error.strerror})") from error
            raise _no_room(folder, error) from error
        except GitFailed as error:
            raise UsageError(f"git cannot list the working tree of {top}: {error}") from error
        yield folder / "tree"


def _copy(top: Path, tree: Path) -> None:
    """Copy the files of the repository `top` into `tree`, and those of the repositories inside of it."""
    tree.mkdir(parents=True, exist_ok=True)
    listed = git(top, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in dict.fromkeys(listed.split("\0")):  # a file in conflict is listed three times
        source, target = top / name, tree / name
        if not name or not os.path.lexists(source):  # removed, but not from git's index
            continue
        if source.is_symlink() or not source.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
        elif (source / ".git").exists():  # a submodule that the user has, or a repository git does not know
            _copy(source, target)
        else:
            target.mkdir(parents=True, exist_ok=True)


def describe(top: Path, tree: Path) -> str:
    """Name a `snapshot` of the repository `top`: its commit, and a digest of its content if that was changed."""
    try:
        on = f" on {git(top, 'rev-parse', '--verify', 'HEAD')[:12]}"
    except GitFailed:  # no commit yet
        on = ""
    if on and not git(top, "status", "--porcelain", "--untracked-files=normal"):
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


def _no_room(folder: Path, error: Exception) -> UsageError:
    return UsageError(
        f"BASE: its files cannot be copied to {folder.parent} ({error}): set TMPDIR to a folder with room for two trees"
    )
