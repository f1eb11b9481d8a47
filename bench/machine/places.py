"""Places for files that are not the user's: temporary folders, and the caches of this project and its libraries."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from bench.errors import UsageError

XDG = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME")

PLACES = ("KVBENCH_CACHE", "HF_HOME", "HF_HUB_CACHE", "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR", "TMPDIR")

PREFIX, LOCK = "kvbench-", "lock"
"""How the names of temporary folders begin, and the file in each that its process holds."""


def settle() -> None:
    """Make the places that the environment names the same for every process that this one starts, wherever it runs.

    Relative paths become absolute, save those of the XDG specification, which has them ignored. Without a home folder
    (HOME unset or relative, and no entry in the password file) `~` is a place that nobody can write, instead of a
    folder of that name here: then what needs a cache refuses, and names the variable to set.

    Raises:
        UsageError: a path has bytes that are no text, or is relative to a folder that was removed; or the umask leaves
            this user no right to the files that it makes.
    """
    umask = os.umask(0o077)
    os.umask(umask)
    if umask & 0o700 and os.geteuid() != 0:
        raise UsageError(f"umask {umask:03o}: no file made here could be used; set another, as in `umask 022`")
    for name in XDG:
        if not os.path.isabs(os.environ.get(name) or os.sep):  # noqa: PTH117  # "" counts as unset
            del os.environ[name]
    for name in PLACES:
        if place := os.environ.get(name):
            place = os.path.expanduser(place)  # noqa: PTH111  # pathlib raises where there is no home
            if place.encode(errors="ignore").decode() != place:
                raise UsageError(f"{name}: {place!r} is no valid text in this locale, set it to another path")
            if not os.path.isabs(place):  # noqa: PTH117  # a text stays a text
                place = os.path.join(current_folder(), place)  # noqa: PTH118
            os.environ[name] = os.path.normpath(place)
    if not os.path.isabs(os.environ.get("HOME", os.sep)):  # noqa: PTH117
        del os.environ["HOME"]
    if os.path.expanduser("~") == "~":  # noqa: PTH111
        os.environ["HOME"] = os.devnull


def current_folder() -> Path:
    """Return the current folder.

    Raises:
        UsageError: a shell stands in one that was removed.
    """
    try:
        return Path.cwd()
    except FileNotFoundError as error:
        raise UsageError("the current folder was removed: go to another") from error


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Make a temporary folder that is removed with the context, and first remove those that killed processes left.

    Raises:
        UsageError: none can be made.
    """
    from filelock import FileLock  # here, so that a help text comes at once

    _remove_abandoned()
    with ExitStack() as stack:
        try:
            folder = Path(tempfile.mkdtemp(prefix=PREFIX)).resolve()
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            stack.enter_context(FileLock(folder / f"{LOCK}.part"))
            (folder / f"{LOCK}.part").rename(folder / LOCK)  # none is ever seen under its name without being held
        except OSError as error:
            raise UsageError(f"no temporary folder can be made ({error}): set TMPDIR to a folder with room") from error
        yield folder


def _remove_abandoned() -> None:
    """Remove this user's temporary folders whose locks nobody holds: their processes are dead."""
    try:
        temporary = Path(tempfile.gettempdir())
    except OSError:  # there is none
        return
    from filelock import FileLock

    for lock in temporary.glob(f"{PREFIX}*/{LOCK}"):
        with suppress(OSError):  # held, or just gone
            if lock.parent.lstat().st_uid == os.geteuid():
                with FileLock(lock, blocking=False):
                    shutil.rmtree(lock.parent, ignore_errors=True)


def require_temporary_bytes(needed: int) -> None:
    """Refuse where the folder of temporary files has not so many bytes free.

    Raises:
        UsageError: it has not, or there is none.
    """
    with temporary_folder() as folder:
        free, where = shutil.disk_usage(folder).free, folder.parent
    if free < needed:
        raise UsageError(
            f"temporary files need about {needed / 1e6:.1f} MB, {where} has {free / 1e6:.1f} MB free: set TMPDIR to a "
            "folder with room"
        )
