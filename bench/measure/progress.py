"""Progress of a run on standard error: a bar with the time left on a terminal, a line for each cell elsewhere.

Nothing is redrawn while a turn runs: a refreshing thread would take its time from the arm that is measured.
"""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from bench.case import Case


class ProgressBar:
    """Says how much is done and how long the rest will take.

    The rest is estimated from the plan's rough seconds, scaled by how long the work of late really took: late, since a
    machine's load changes, and since the turns to come are more like the last ones than like the first, shortest ones.
    """

    MEMORY = 0.97
    """What a turn counts for when the next one is done: the last thirty or so decide."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description:<34}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[left]}"),
            console=self._console,
            auto_refresh=False,
            transient=True,
        )
        self._task = self._bar.add_task("starting the workers", total=0.0, left="")
        self._expected = self._done = self._judged = self._took = 0.0
        self._last_line = ""
        self._started = time.monotonic()

    def expect(self, seconds: float) -> None:
        """So much more work lies ahead than was said so far, or less, in rough seconds."""
        self._expected += seconds
        self._bar.update(self._task, total=self._expected, refresh=True)

    def done(self, seconds: float, took_s: float | None, case: Case) -> None:
        """So much of it is done, and took `took_s` in truth (None: not to be judged by)."""
        self._done += seconds
        if took_s is not None:
            self._judged = self.MEMORY * self._judged + seconds
            self._took = self.MEMORY * self._took + took_s
        pace = self._took / self._judged if self._judged else 1.0
        left_s = round(pace * max(0.0, self._expected - self._done))
        text = f"about {_minutes(left_s)} left" if left_s else "nearly done"
        if self._console.is_terminal:
            name = f"{case.label} {case.strategy}"
            self._bar.update(self._task, completed=self._done, description=name, left=text, refresh=True)
        elif took_s is not None and case.label != self._last_line:
            self._last_line = case.label
            print(f"measuring {case.label}, {text}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> ProgressBar:
        if self._console.is_terminal:
            self._bar.start()
        else:
            print("starting the workers and loading the model", file=sys.stderr, flush=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._console.is_terminal:
            self._bar.stop()
        if kind is None:
            print(f"measured in {_minutes(time.monotonic() - self._started)}", file=sys.stderr, flush=True)


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
