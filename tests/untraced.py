"""What `--cov` does not trace: libraries, the collection of tests, and cases of a test that show nothing new.

On Python 3.11 a tracer slows every instruction of its thread, also in files that are not measured: a plot takes 1.8
times as long, transformers 1.6 times as long to import. So libraries are untraced while they are imported, draw or
compile, and pytest while it collects. Models are traced: their caches are ours.

A case of a parametrised test that runs no line that this process has not seen ends the tracing of that test: its other
cases run the same lines on other models or figures. All of them run, a third of the suite's time.

So the figure of coverage is a lower bound: what a later case runs alone, or a library calls back, counts as not run.

That holds for the process of the tests and for what it forks. Processes that tests start anew are traced all through,
or not at all (`untraced_variables`).
"""

import functools
import os
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

OURS = tuple(str(Path(__file__).resolve().parents[1] / package) for package in ("bench", "kvcache"))

LIBRARIES = {
    "matplotlib.axes._axes": ["Axes.annotate", "Axes.barh", "Axes.errorbar", "Axes.fill_between", "Axes.plot"],
    "matplotlib.axes._base": ["_AxesBase.get_tightbbox"],
    "matplotlib.backends.backend_agg": ["FigureCanvasAgg.draw"],
    "matplotlib.figure": [
        "Figure.draw_without_rendering",
        "Figure.savefig",
        "FigureBase.add_subplot",
        "FigureBase.colorbar",
        "FigureBase.legend",
        "FigureBase.subplots",
    ],
    "pandas.core.frame": [
        "DataFrame.__getitem__",
        "DataFrame.drop_duplicates",
        "DataFrame.merge",
        "DataFrame.sort_values",
    ],
    "torch._dynamo.convert_frame": ["CatchErrorsWrapper.__call__"],
}
"""By module, what takes long and calls nothing of ours but the texts of ticks. (To trace a graph calls no function.)"""

_ASIDE = threading.local()
"""`start` gives a thread its tracer back, where that is put aside."""


def put_tracer_aside() -> None:
    """Have libraries be imported, from now on, and do what `LIBRARIES` names, without coverage's tracer."""
    execute = SourceFileLoader.exec_module
    untraced = without_tracer(execute)

    @functools.wraps(execute)
    def exec_module(loader: SourceFileLoader, module: ModuleType) -> None:
        start = getattr(_ASIDE, "start", None)
        if not loader.path.startswith(OURS):
            untraced(loader, module)
        elif start is None or sys.gettrace() is not None:
            execute(loader, module)
        else:  # a module's own lines run once, whoever imports it
            start()
            try:
                execute(loader, module)
            finally:
                sys.settrace(None)
        for name in LIBRARIES.get(module.__name__, ()):
            kind, _, method = name.partition(".")
            owner = getattr(module, kind)
            setattr(owner, method, without_tracer(getattr(owner, method)))

    SourceFileLoader.exec_module = exec_module  # type: ignore[assignment, method-assign]  # for good


class CasesWithoutNews:
    """A plugin of pytest: of each test, traces its cases up to the first that runs nothing new."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Run a case, without the tracer if its test is known.

        pytest-cov's own mark for that, `no_cover`, stops and starts coverage, and at each start coverage 7.17 patches
        os.fork and os._exit once more (findings/coverage_patches_again.sh): after some hundred cases a fork took 24 s.
        """
        test = item.nodeid.partition("[")[0]
        if test in self._known:
            with tracer_aside():
                return (yield)
        before = _n_seen()
        result = yield
        if _n_seen() == before:
            self._known.add(test)
        return result


def _n_seen() -> int:
    """Count the arcs that coverage's tracer has seen in this process."""
    return sum(map(len, getattr(sys.gettrace(), "data", {}).values()))


def untraced_variables() -> dict[str, str]:
    """Return this process's environment for one whose lines other tests run: coverage's variables are left out."""
    return {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}


def without_tracer(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, which puts the tracer aside, if there is one, while it runs."""

    @functools.wraps(function)
    def untraced(*arguments: Any, **named: Any) -> Any:
        with tracer_aside():
            return function(*arguments, **named)

    return untraced


@contextmanager
def tracer_aside() -> Iterator[None]:
    """Put this thread's tracer aside, if there is one, but for the modules of ours that are imported meanwhile."""
    start = getattr(sys.gettrace(), "start", None)
    if start is None:  # no tracer, or not coverage's own
        yield
        return
    sys.settrace(None)
    before, _ASIDE.start = getattr(_ASIDE, "start", None), start
    try:
        yield
    finally:
        _ASIDE.start = before
        start()  # coverage's own way: after sys.settrace it would not see this function return
