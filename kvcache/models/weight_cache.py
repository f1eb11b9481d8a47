"""Folders of weights in the user's cache folder: made once, whole or not at all, and mapped by every process after."""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

_MARKER = "kvbench-complete-2.json"
"""Lists the other files of a folder with their sizes; written last. Its number is that of the layout of the folders."""

_CACHE_LINE_BYTES = 64


class ModelError(Exception):
    """A model cannot be loaded. The message is one line for users: the value at fault and what would be valid."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class AttentionError(ModelError):
    """The model is there, but it cannot have the attention implementation that was asked for."""


def cache_folder() -> Path:
    """Return `$KVBENCH_CACHE`, or else `kvbench` in the user's cache folder (`$XDG_CACHE_HOME`, `~/.cache`)."""
    own = os.environ.get("KVBENCH_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    xdg = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if not (xdg.is_absolute() or xdg.parts[0] == "~"):  # the specification has a relative path ignored
        xdg = Path("~/.cache")
    try:
        return xdg.expanduser() / "kvbench"
    except RuntimeError as error:
        raise ModelError("no home folder is known here; set KVBENCH_CACHE to a folder that can be written") from error


def require(beginning: str) -> None:
    """Refuse early where the cache folder has no folder whose name begins so, and none can be made.

    Raises:
        ModelError: it cannot be written.
    """
    cache = cache_folder()
    try:
        if not any(cache.glob(f"{beginning}*")):
            cache.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=cache).close()
    except OSError as error:
        raise _unwritable(cache, error) from error


def _unwritable(folder: Path, error: Exception) -> ModelError:
    return ModelError(
        f"cannot write {folder} ({error}); set KVBENCH_CACHE to a folder that can be written and has room"
    )


def find(name: str) -> Path | None:
    """Find the folder `name` of the cache folder if it is whole: each of its files has the size it was made with."""
    folder = cache_folder() / name
    try:
        sizes: dict[str, int] = json.loads((folder / _MARKER).read_text())
        whole = all((folder / file).stat().st_size == size for file, size in sizes.items())
    except (OSError, ValueError):
        return None
    return folder if whole else None


def made_once(name: str, make: Callable[[Path], None], *, note: str) -> Path:
    """Return the folder `name` of the cache folder; where it is not whole, `make(empty folder)` fills it first.

    What decides the content (a digest, a seed, the data type) belongs into `name`: a whole folder is never made again.
    Processes that ask at the same time wait for the first one, and a process that dies on the way leaves nothing
    that would be taken for whole. `note` is written to stderr before the making.

    Raises:
        ModelError: the cache folder cannot be written, or `make` says so.
    """
    from safetensors import SafetensorError  # here, so that the names of models are known without it

    found = find(name)
    if found is not None:
        return found
    folder = cache_folder() / name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_name(f"{name}.lock")
        with FileLock(lock):
            try:
                if find(name) is None:  # another process may have made it while this one waited
                    sys.stderr.write(f"kvbench: {note}\n")
                    sys.stderr.flush()
                    _make(folder, make)
            finally:
                lock.unlink(missing_ok=True)  # filelock makes another for those that wait for this one
    except (OSError, SafetensorError) as error:
        raise _unwritable(folder, error) from error
    return folder


def _make(folder: Path, make: Callable[[Path], None]) -> None:
    """Fill a folder beside `folder`, bring it to the disk, and give it its name."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # left by a process that was killed
    part.mkdir()
    try:
        make(part)
        for path in part.glob("*.safetensors"):
            _align(path)
        files = [path for path in part.rglob("*") if path.is_file()]
        sizes = {path.relative_to(part).as_posix(): path.stat().st_size for path in files}
        marker = part / _MARKER
        marker.write_text(json.dumps(sizes, indent=2) + "\n")
        for path in (*files, marker):
            _sync(path)
        shutil.rmtree(folder, ignore_errors=True)  # damaged, or it would have been found
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _align(path: Path) -> None:
    """Pad the header of a safetensors file with spaces, so that its data begin at a cache line.

    Where they do not, every vector that is loaded from the mapped file lies across two lines: decode of `compiled`
    takes 8 % longer.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(size)
        padding = -(8 + size) % _CACHE_LINE_BYTES
        aligned = path.with_suffix(".aligned")
        with aligned.open("wb") as target:
            target.write((size + padding).to_bytes(8, "little") + header + b" " * padding)
            shutil.copyfileobj(file, target, 1 << 24)
    aligned.replace(path)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
