"""The user's own code, `module:factory`: import it, and name the line where it raised."""

import difflib
import importlib
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from kvcache.models.skeleton import is_out_of_memory, one_line, refusing
from kvcache.models.weight_cache import ModelError


def load_own(module: str, name: str, spec: str) -> Callable[..., Any]:
    """Import the function `name` of `module`, which may lie in the working directory.

    Raises:
        ModelError: there is no such module or function, or the module raises.
    """
    if module.endswith(".py"):
        raise ModelError(f"{spec}: {module} is a file; give its module, {module.removesuffix('.py')}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # not first: a random.py of the user must not hide Python's
    with refusing(spec), naming_the_line(spec):
        try:
            loaded = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # of a module that the user's own imports
            looked = f"looked in {here} and on Python's path"
            raise ModelError(f"{spec}: No module named {error.name!r} ({looked})") from error
        if not hasattr(loaded, name):
            near = difflib.get_close_matches(name, vars(loaded), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            place = getattr(loaded, "__file__", None) or "without a file of its own"
            raise ModelError(f"{spec}: module {module} ({place}) has no {name}{hint}")
        factory: Callable[..., Any] = getattr(loaded, name)
    return factory


@contextmanager
def naming_the_line(spec: str) -> Iterator[None]:
    """Name in an error the innermost line of the user's own code; what that code prints goes to stderr.

    Raises:
        ModelError: the code inside raised, and lines of the user's own led there.
    """
    try:
        with redirect_stdout(sys.stderr):  # stdout is a document
            yield
    except (ModelError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        place = users_line(error)
        if is_out_of_memory(error) or place is None:
            raise
        raise ModelError(f"{spec} raised {one_line(error)} ({place})") from error


def users_line(error: BaseException) -> str | None:
    """Return the file and the innermost line of the user's own code that led to `error`; None where none did."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if _is_users(frame.filename)]
    return f"{own[-1].filename}, line {own[-1].lineno}" if own else None


def _is_users(filename: str) -> bool:
    """Return whether a file of a traceback is the user's: not frozen, not in Python's folders or this project's."""
    path, project = Path(filename), Path(__file__).parents[2]
    others = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")]
    others += [project / "kvcache", project / "bench"]
    return path.is_file() and not any(path.is_relative_to(folder) for folder in others)
