"""Places for files that are not the user's: temporary folders, and the caches of this project and its libraries."""

import os
import shutil
import tempfile
from pathlib import Path

from bench.errors import UsageError

XDG = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME")

PLACES = ("KVBENCH_CACHE", "HF_HOME", "HF_HUB_CACHE", "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR", "TMPDIR")


def settle() -> None:
    """Make the places that the environment names the same for every process that this one starts, wherever it runs.

    Relative paths become absolute, save those of the XDG specification, which has them ignored. Without a home folder
    (HOME unset or relative, and no entry in the password file) `~` is a place that nobody can write, instead of a
    folder of that name here: then what needs a cache refuses, and names the variable to set.

    Raises:
        UsageError: a path has bytes that are no text, or is relative to a folder that was removed.
    """
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


def temporary_folder(prefix: str = "kvbench-") -> tempfile.TemporaryDirectory[str]:
    """Make a temporary folder; raises UsageError where none can be made."""
    try:
        return tempfile.TemporaryDirectory(prefix=prefix)
    except OSError as error:
        raise UsageError(f"no temporary folder can be made ({error}): set TMPDIR to a folder with room") from error


def require_temporary_bytes(needed: int) -> None:
    """Refuse where the folder of temporary files has not so many bytes free.

    Raises:
        UsageError: it has not, or there is none.
    """
    with temporary_folder() as folder:
        free = shutil.disk_usage(folder).free
        where = Path(folder).parent
    if free < needed:
        raise UsageError(
            f"temporary files need about {needed / 1e6:.1f} MB, {where} has {free / 1e6:.1f} MB free: set TMPDIR to a "
            "folder with room"
        )
