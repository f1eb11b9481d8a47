"""The two sides of an A/B: what base and head are, checked out and checked, and what forks fresh workers of each."""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.ab import worktrees
from bench.ab.record import Side, SideName
from bench.errors import DataError, UsageError
from bench.machine.places import temporary_folder
from bench.measure.server_process import TREE, ForkServer
from bench.protocol import Introduction


class SideServer(ForkServer):
    """The fork server of one side, for one model."""

    def __init__(self, side: Side, model: str, n_threads: int) -> None:
        """Start importing; `wait` for the end of it."""
        self.side = side
        self._links = ExitStack()
        trees = [Path(path) for path in (side.tree, side.folder) if path is not None]
        if not side.has_worker:
            # Links to the driver's two packages, not the folder they lie in: as a site-packages it would give another
            # interpreter this one's torch.
            links = self._links.enter_context(temporary_folder())
            for package in ("bench", "kvcache"):
                (links / package).symlink_to(TREE / package)
            trees.append(links)
        try:
            super().__init__(
                model,
                n_threads,
                name=f"{side.name} ({side.label})",
                python=side.python,
                variables=side.variables,
                trees=trees,
                folder=side.folder,
            )
        except OSError as error:
            self._links.close()
            raise UsageError(f"--{side.name}-python {side.python}: {error.strerror}") from error

    def wait(self) -> Introduction:
        """Wait as a `ForkServer` does, and refuse a user's model that is not the checkout's own."""
        found = super().wait()
        if self.model.startswith("py:") and self.side.tree is not None and not self.side.has_worker:
            code, tree = found.model_code, Path(self.side.tree).resolve()
            if code is None or not Path(code).is_relative_to(tree):
                raise DataError(f"{self.name} imported {self.model} from {code}, not from its checkout: not comparable")
        return found

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._links.close()


@contextmanager
def sides(
    base: str | None,
    head: str | None,
    *,
    pythons: Mapping[str, str | None],
    variables: Mapping[str, Sequence[str]],
    here: Path,
) -> Iterator[tuple[Side, Side]]:
    """Set base and head up, checked out where they are revisions.

    Raises:
        UsageError: a revision or a variable is not valid, or base and head are the same.
    """
    if base is None and not any([*pythons.values(), *variables.values()]):
        raise UsageError(
            "BASE: name the revision to compare with, as in `kvbench ab main`, or another environment "
            "(--base-python, --head-python, --base-env, --head-env)"
        )
    with ExitStack() as stack:
        found: list[Side] = []
        names: list[tuple[SideName, str | None]] = [("base", base), ("head", head)]
        for name, revision in names:
            tree, folder, label = None, here, ""
            if base is not None:
                top = worktrees.repository(here)
                if revision is None:
                    tree = stack.enter_context(worktrees.snapshot(top))
                    label = worktrees.describe(top, tree)
                else:
                    sha = worktrees.commit(top, revision, name.upper())
                    tree, label = stack.enter_context(worktrees.checkout(top, sha)), sha[:12]
                folder = tree / here.relative_to(top)
            own = dict(_variable(f"--{name}-env", text) for text in variables[name])
            python = absolute(pythons[name] or sys.executable, here)
            label = ", ".join([*filter(None, [label, pythons[name]]), *map("=".join, own.items())]) or "as it is"
            found.append(
                Side(
                    name=name,
                    label=label,
                    python=python,
                    variables=own,
                    tree=str(tree) if tree is not None else None,
                    folder=str(folder if folder.is_dir() else tree),
                )
            )
        yield found[0], found[1]


def refuse_twins(base: Side, head: Side, models: Sequence[str]) -> None:
    """Refuse two sides of which one has no worker, or that cannot differ in anything.

    Raises:
        DataError: one side's checkout holds this project's code and the other's does not.
        UsageError: both sides would run the same code in the same environment.
    """
    if base.has_worker != head.has_worker:
        lacking = head if base.has_worker else base
        raise DataError(f"{lacking.name} ({lacking.label}) has no worker protocol (bench/worker.py): not comparable")
    own_code = base.has_worker or any(model.startswith("py:") for model in models)
    if base.tree is not None and not own_code and (base.python, base.variables) == (head.python, head.variables):
        raise UsageError(
            "BASE: this repository is not kvbench's own, so its revisions can differ only in your model: give it as "
            "--model py:module:factory"
        )


def absolute(program: str, here: Path) -> str:
    """Make the path of an interpreter absolute; links are kept, since a virtual environment is found by them."""
    return os.path.abspath(here / program) if os.sep in program else program  # noqa: PTH100  # resolve() follows links


def absolute_folders(models: Sequence[str], here: Path) -> tuple[str, ...]:
    """Make the paths of checkpoint folders absolute, since workers run elsewhere; other models stay as they are."""
    paths = ((model, here / Path(model).expanduser()) for model in models)
    return tuple(os.path.abspath(path) if model and path.is_dir() else model for model, path in paths)  # noqa: PTH100


def _variable(flag: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UsageError(f"{flag} {text}: give NAME=VALUE, as in ATEN_CPU_CAPABILITY=avx2")
    if name == "PYTHONPATH":
        raise UsageError(f"{flag} {text}: kvbench sets it for each side; set it for both, outside of kvbench")
    return name, value
