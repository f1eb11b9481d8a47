"""A clock that tests set: time passes only at stamps, and the order of calls is kept."""

from collections.abc import Iterable, Iterator
from itertools import repeat

from bench.machine.clock import Times


class FakeClock:
    """Gives each stamp the next of `intervals_ns`; `calls` collects what was asked of it, for tests of the order."""

    def __init__(self, intervals_ns: Iterable[int] = repeat(1_000_000), calls: list[str] | None = None) -> None:
        self._source: Iterator[int] = iter(intervals_ns)
        self._host_ns: list[int] = []
        self.calls: list[str] = [] if calls is None else calls

    def start(self) -> None:
        self.calls.append("start")
        self._host_ns = []

    def stamp(self, *, end_of_phase: bool = False) -> None:
        self.calls.append("stamp end of phase" if end_of_phase else "stamp")
        self._host_ns.append(next(self._source))

    def stop(self) -> Times:
        self.calls.append("stop")
        return Times(host_ns=self._host_ns, event_ns=None)
