"""Files derived from stored data: one that cannot be written costs neither the data nor the table."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Derived:
    """Tries to write derived files and collects what failed, by its reason."""

    def __init__(self) -> None:
        self.failed: dict[str, list[str]] = {}
        """What could not be written, by its reason."""

    @contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """Write `what` in the block; an error of any kind is collected and ends only the block."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever a library raises: what is measured is worth more than any plot
            names = self.failed.setdefault(_reason(error), [])
            if what not in names:
                names.append(what)

    def add(self, other: "Derived") -> None:
        """Take over what failed elsewhere."""
        for reason, names in other.failed.items():
            known = self.failed.setdefault(reason, [])
            known.extend(name for name in names if name not in known)

    def text(self, what: str, make: Callable[[], str]) -> str:
        """Return the text that `make` makes; nothing where it fails, which is collected."""
        made: list[str] = []
        with self.trying(what):
            made.append(make())
        return "".join(made)

    def lines(self) -> list[str]:
        """Return a line for each reason: what could not be written, and why."""
        return [f"kvbench: not written: {', '.join(names)} ({reason})" for reason, names in self.failed.items()]


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    first_line = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first_line}"
