"""The two sides of an A/B: an interpreter, an environment and a tree each, and fresh workers of it for every pair."""

from __future__ import annotations

from pathlib import Path

from bench.ab.record import Side
from bench.errors import DataError, UsageError
from bench.machine.places import temporary_folder
from bench.measure.server_process import TREE, ForkServer
from bench.protocol import Introduction


class SideServer(ForkServer):
    """The fork server of one side, for one model."""

    def __init__(self, side: Side, model: str, n_threads: int) -> None:
        """Start importing; `wait` for the end of it."""
        self.side = side
        self._links = temporary_folder("kvbench-ab-")
        trees = [Path(path) for path in (side.tree, side.folder) if path is not None]
        if not side.has_worker:
            # Links to the driver's two packages, not the folder they lie in: as a site-packages it would give another
            # interpreter this one's torch.
            for package in ("bench", "kvcache"):
                (Path(self._links.name) / package).symlink_to(TREE / package)
            trees.append(Path(self._links.name))
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
            self._links.cleanup()
            raise UsageError(f"--{side.name}-python {side.python}: {error.strerror}") from error

    def wait(self) -> Introduction:
        """Wait as a `ForkServer` does, and refuse a user's model that is not the checkout's own."""
        found = super().wait()
        own = Path(self.side.tree).resolve() if self.side.tree is not None else None
        if self.model.startswith("py:") and own is not None and not self.side.has_worker and not _lies_in(found, own):
            raise DataError(
                f"{self.name} imported {self.model} from {found.model_code}, not from its checkout: not comparable"
            )
        return found

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._links.cleanup()


def _lies_in(found: Introduction, tree: Path) -> bool:
    """Whether the user's model is the checkout's own."""
    return found.model_code is not None and Path(found.model_code).is_relative_to(tree)
