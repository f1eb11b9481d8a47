"""Progress on standard error: a bar with the time left on a terminal, a line for each part of the work elsewhere.

Nothing is redrawn while a turn runs: a refreshing thread would take its time from the worker that is measured.
"""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

PACE_PERIOD_S = 120.0
"""The time left is judged by the pace of so long: a machine's load changes, and the next turns are like the last."""


class ProgressBar:
    """Shows how much is done and how long the rest will take; never runs backwards. Use as a context manager.

    The work comes in parts, and a part that takes fewer turns than expected, or fails, counts as done when the next one
    begins. Amounts are in rough seconds, or in any unit.
    """

    def __init__(self, first_line: str, last_line: str) -> None:
        """`first_line` is said at the start, `last_line` at the end, before the time that it all took."""
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description:<34}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=self._console,
            auto_refresh=False,
            transient=True,
            speed_estimate_period=PACE_PERIOD_S,
        )
        self._first_line, self._last_line = first_line, last_line
        self._id = self._bar.add_task(first_line, total=None)
        self._done = self._reached = self._total = 0.0
        self._title = ""
        self._started = time.monotonic()

    def expect(self, total: float) -> None:
        """Set how much work there is in all."""
        self._total = total
        self._bar.update(self._id, total=total, refresh=self._console.is_terminal)

    def begin(self, title: str, amount: float) -> None:
        """Begin a part of the work; all that came before it is done."""
        self._advance_to(self._reached)
        self._reached = min(self._total, self._reached + amount)
        self._title = title
        if not self._console.is_terminal:
            left_s = self._bar.tasks[0].time_remaining
            left = f", about {_minutes(left_s)} left" if left_s else ""
            print(f"{title}{left}", file=sys.stderr, flush=True)

    def advance(self, amount: float, detail: str = "") -> None:
        """Count so much of the part as done, at most all of it."""
        self._advance_to(min(self._done + amount, self._reached), detail)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _advance_to(self, done: float, detail: str = "") -> None:
        self._done = max(done, self._done)
        description = f"{self._title} {detail}".strip() or self._first_line
        self._bar.update(self._id, completed=self._done, description=description, refresh=self._console.is_terminal)

    def __enter__(self) -> ProgressBar:
        if self._console.is_terminal:
            self._bar.start()
        else:
            print(self._first_line, file=sys.stderr, flush=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._console.is_terminal:
            self._bar.stop()
        if kind is None:
            print(f"{self._last_line} {_minutes(time.monotonic() - self._started)}", file=sys.stderr, flush=True)


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
