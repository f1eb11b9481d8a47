"""Which cores the threads of a process may use, whether they compute, and how long they have waited for one (Linux).

Every function that takes a `pid`, but `waited_ns`, raises FileNotFoundError where the process is gone.

The number of threads is `--threads` alone, so the user's variables that set or cap it are overridden in workers. Where
threads run and how they wait is the user's to choose, so those variables reach the workers; both is said in one line.
"""

import math
import os
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from bench.machine import cgroup

MOST_SPIN_S, SPIN_POLL_S = 5.0, 0.0005
"""For how long `wait_for_rest` watches threads compute, and how often it looks. Waiting threads spin for some
milliseconds of their own; where other programs have the cores, that takes longer."""

COUNT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Set to `--threads`."""
CAPS = ("OMP_THREAD_LIMIT", "OMP_DYNAMIC", "MKL_DYNAMIC")
"""Removed: under them a library may start fewer threads than a case names."""
BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
"""Kept: which cores the threads are bound to. OpenMP binds the thread that loads it too."""
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Kept: how threads without work wait."""

_AT_START = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
"""The cores of the thread that imported `bench`, before anything that binds it: under OMP_PROC_BIND and its kind
importing torch leaves its thread one core, and every process started later inherits that."""
_bound: list[frozenset[int]] = []
"""What imports had bound the thread to when `unbind` was called."""


def allowed_cores() -> int:
    """Count the logical cores that this process may use: those of its affinity (and cpuset) when it began."""
    return len(_AT_START) if _AT_START is not None else os.cpu_count() or 1


def usable_cores() -> int:
    """Count the cores that this process can keep busy: the allowed ones, cut by a container's CPU quota.

    A quota of 1.5 is one core, since two threads would be stopped in every period; at least one is left.
    """
    return max(1, math.floor(min(allowed_cores(), cgroup.cpu_quota())))


def unbind() -> frozenset[int] | None:
    """Give the calling thread the cores back that it had at the start, so that its children inherit all of them.

    Returns:
        The cores that an import had bound it to, now or earlier; None where it was not bound.
    """
    if _AT_START is not None and (bound := frozenset(os.sched_getaffinity(0))) != _AT_START:
        _bound.append(bound)
        os.sched_setaffinity(0, _AT_START)
    return _bound[-1] if _bound else None


def user_variables(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables of the user that concern threads."""
    return {name: environment[name] for name in (*COUNT, *CAPS, *BINDING, *WAITING) if environment.get(name)}


def binding(variables: Mapping[str, str]) -> str | None:
    """Return those of `variables` that bind threads, as in `OMP_PROC_BIND=close`; None without any."""
    return ", ".join(f"{name}={variables[name]}" for name in BINDING if name in variables) or None


def with_threads(n_threads: int, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return `environment` with so many threads: no variable of the user's sets another number, or caps it."""
    kept = {name: value for name, value in environment.items() if name not in CAPS}
    return kept | dict.fromkeys(COUNT, str(n_threads))


def notice(thread_counts: Collection[int], variables: Mapping[str, str]) -> str | None:
    """Say in one line what becomes of the user's variables in workers of so many threads; None without any."""
    counts = {str(count) for count in thread_counts}
    overridden = [f"{name}={variables[name]}" for name in COUNT if name in variables and {variables[name]} != counts]
    overridden += [f"{name}={variables[name]}" for name in CAPS if name in variables]
    kept = [f"{name}={variables[name]}" for name in (*BINDING, *WAITING) if name in variables]
    parts = [f"{', '.join(overridden)} overridden (--threads decides)"] if overridden else []
    parts += [f"{', '.join(kept)} kept"] if kept else []
    return f"variables for threads: {'; '.join(parts)}" if parts else None


def common(pid: int) -> frozenset[int]:
    """Return the cores that every thread of `pid` may use; none where they differ, or the system has no affinities."""
    if not hasattr(os, "sched_getaffinity"):
        return frozenset()
    found = set()
    for thread in _threads(pid):
        with suppress(ProcessLookupError):  # a thread that has ended meanwhile
            found.add(frozenset(os.sched_getaffinity(thread)))
    return found.pop() if len(found) == 1 else frozenset()


def give(pid: int, cores: Collection[int]) -> None:
    """Let the threads of `pid`, and those that they start, use `cores` alone.

    Raises:
        OSError: the system does not allow it.
    """
    for thread in _threads(pid):
        with suppress(ProcessLookupError):
            os.sched_setaffinity(thread, cores)


def terms(pid: int) -> str:
    """Describe cores and priority of the threads of `pid`: what must be equal for two times to be comparable."""
    if not hasattr(os, "sched_getaffinity"):
        return "any core"
    found = set()
    for thread in _threads(pid):
        with suppress(ProcessLookupError):
            cores = ",".join(map(str, sorted(os.sched_getaffinity(thread))))
            found.add(f"cores {cores} at nice {os.getpriority(os.PRIO_PROCESS, thread)}")
    return " and ".join(sorted(found))


def at_rest(pid: int) -> bool:
    """Return whether no thread of `pid` is on a core or waits for one now (proc(5), the state in stat).

    The CPU time that a process has used would not do: it is brought up to date by the scheduler's tick alone.
    """
    # The name before the state may hold anything.
    return not any(stat.rpartition(")")[2].split()[0] == "R" for stat in _files_of_threads(pid, "stat"))


def wait_for_rest(pid: int) -> bool:
    """Wait until no thread of `pid` computes, for `MOST_SPIN_S` at most; whether that came. True at once off Linux."""
    if sys.platform != "linux":
        return True
    deadline = time.monotonic() + MOST_SPIN_S
    while not at_rest(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(SPIN_POLL_S)
    return True


def waited_ns(pid: int) -> int | None:
    """Return how long the threads of `pid` have waited, ready to run, for a core (schedstat); None off Linux."""
    try:
        return sum(int(schedstat.split()[1]) for schedstat in _files_of_threads(pid, "schedstat"))
    except OSError:
        return None


def _threads(pid: int) -> list[int]:
    return [int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()]


def _files_of_threads(pid: int, name: str) -> Iterator[str]:
    """Read a file of proc(5) of each thread that has not ended meanwhile."""
    for thread in _threads(pid):
        with suppress(FileNotFoundError, ProcessLookupError):
            yield Path(f"/proc/{pid}/task/{thread}/{name}").read_text(encoding="utf-8", errors="replace")
