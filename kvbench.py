"""The program `kvbench`: it finds its own code, and Python's, whatever else has such a name, and runs bench/cli.py.

The folders of PYTHONPATH are searched before those of installed packages and of Python itself. What is imported here
comes before any search.
"""

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder

OWN = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120  # pathlib may be one of the hidden modules
PACKAGES = ("bench", "kvcache")


class OwnCode:
    """Finds the two packages beside this file, wherever that stands in the search for modules."""

    @staticmethod
    def find_spec(name: str, _path: object = None, _target: object = None) -> ModuleSpec | None:
        """Return where `name` is, if it is one of the two."""
        return PathFinder.find_spec(name, [OWN]) if name in PACKAGES else None


def hidden() -> str | None:
    """Name the first file in a folder of PYTHONPATH that hides a module of Python's own; None where none does."""
    for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if not sys.flags.ignore_environment else []:
        for path in (os.path.join(folder, file) for file in sorted(_names(folder))):  # noqa: PTH118
            name = os.path.basename(path).partition(".")[0]  # noqa: PTH119
            if name in sys.stdlib_module_names and (path.endswith((".py", ".so")) or "__init__.py" in _names(path)):
                return f"{path} hides Python's own module {name}: rename it, or change PYTHONPATH"
    return None


def _names(folder: str) -> list[str]:
    """List a folder; "" is the current one, and what is none has no names."""
    try:
        return os.listdir(folder or ".")  # noqa: PTH208
    except OSError:
        return []


def main() -> None:
    """Run the command; where it cannot even be imported, say why in one line: exit code 1 would mean regression."""
    sys.meta_path.insert(0, OwnCode)
    try:
        from bench.cli import main as run
    except Exception as error:
        if "KVBENCH_TRACEBACK" in os.environ:
            raise
        name = f"{type(error).__name__}: {error}".rstrip(": ")
        reason = f"cannot start: {name}; {hidden() or 'set KVBENCH_TRACEBACK=1 to see where'}"
        if sys.stderr is not None:
            sys.stderr.write(f"kvbench: {' '.join(reason.split())}\n")
        sys.exit(2)
    run(hidden=hidden)


if __name__ == "__main__":
    main()
