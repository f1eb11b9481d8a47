"""What the user's environment says of threads, and what becomes of it in a worker.

The number of threads is `--threads` alone, so variables that set or cap it are overridden. Where threads run and how
they wait is the user's to choose, so those variables reach the workers; both is said in one line.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping

COUNT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Set to `--threads`."""
CAPS = ("OMP_THREAD_LIMIT", "OMP_DYNAMIC", "MKL_DYNAMIC")
"""Removed: under them a library may start fewer threads than a case names."""
BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
"""Kept: which cores the threads are bound to. OpenMP binds the thread that loads it too."""
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Kept: how threads without work wait."""


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
