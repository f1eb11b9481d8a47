"""Checks an installed wheel from outside the checkout: every file is in it, every module can be imported from it.

`nox -s wheel` runs it with the Python of a clean environment that holds the wheel. It is no pytest module: pytest runs
in the checkout, where every import would succeed.
"""

import importlib
import subprocess
import sys
import sysconfig
from importlib.metadata import distribution
from pathlib import Path

PACKAGES = ("bench", "kvcache")


def main() -> None:
    """Exit with a message that names the first thing that is wrong, or print how much was imported."""
    checkout, installed = Path(__file__).resolve().parent.parent, Path(sysconfig.get_path("purelib"))
    wanted = {path.relative_to(checkout) for package in PACKAGES for path in source_files(checkout / package)}
    wanted.add(Path("kvbench.py"))
    in_wheel = {Path(file) for file in distribution("kvbench").files or ()}
    if missing := sorted(map(str, wanted - in_wheel)):
        raise SystemExit(f"not in the wheel: {', '.join(missing)}")

    modules = sorted(module_name(path) for path in wanted if path.suffix == ".py")
    for name in modules:
        place = Path(importlib.import_module(name).__file__ or "")
        if not place.is_relative_to(installed):
            raise SystemExit(f"{name} was imported from {place}, not from the wheel in {installed}")
    kvbench = Path(sysconfig.get_path("scripts"), "kvbench")
    subprocess.run([str(kvbench), "--help"], check=True, stdout=subprocess.DEVNULL, cwd=sys.prefix)
    print(f"{len(modules)} modules imported from {installed}")


def source_files(package: Path) -> list[Path]:
    """What git would keep of a package: no compiled files."""
    return [path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]


def module_name(path: Path) -> str:
    """`bench/judge/gate.py` -> `bench.judge.gate`; a package is named by its folder."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


if __name__ == "__main__":
    main()
