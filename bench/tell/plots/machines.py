"""Every plot of a run, machine by machine; hosts of one name (two containers, say) are taken for one machine."""

import functools
from collections.abc import Callable, Iterator

import pandas as pd

from bench.manifest import ELSEWHERE
from bench.tell.drawn import MOST_PLOTS, few
from bench.tell.plots import caches, run
from bench.tell.plots.steps import file_suffix
from bench.tell.plots.style import Drawings
from bench.tell.words import ON_MACHINE


def groups(
    summary: pd.DataFrame, steps: pd.DataFrame, slopes: pd.DataFrame, agreement: pd.DataFrame
) -> Iterator[Callable[[], Drawings]]:
    """Yield what lists the plots of a run, in groups that do not depend on each other; see `run.groups`.

    Where several machines measured it, each has its own, which name it in their title and in the name of their file. An
    import's say that it was measured elsewhere.
    """
    names = list(dict.fromkeys(summary["machine"]))
    is_named = len(names) > 1 or names == [ELSEWHERE]
    for name in few(names, MOST_PLOTS):
        rows, own_steps, own_slopes, own_agreement = (
            frame[frame["machine"] == name].assign(**{ON_MACHINE: name}) if is_named else frame
            for frame in (summary, steps, slopes, agreement)
        )
        suffix = file_suffix(rows, summary, ["machine"])
        for listed in [*run.groups(rows, own_steps, own_slopes), *caches.groups(rows, own_agreement)]:
            yield functools.partial(_named, listed, suffix)


def _named(listed: Callable[[], Drawings], suffix: str) -> Drawings:
    return {f"{name}{suffix}": draw for name, draw in listed().items()}
