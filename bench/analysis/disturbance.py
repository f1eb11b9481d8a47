"""The one rule for turns that the machine, not the code, disturbed. Works on numbers and on columns of them."""

from typing import Any

import numpy as np

STEAL_SHARE = 0.05
"""A turn is disturbed if it lost more than this share of the CPU time that its threads could use."""

COUNTED = ("steal_ns", "throttled_ns", "gpu_throttle_reasons")
"""What of a turn's covariates decides."""

CLOCK_TICK_NS = 10_000_000
"""Linux counts CPU time in ticks of 10 ms: a single one in a turn is the rounding of a counter, not a disturbance."""

GPU_SLOWDOWN_REASONS = 0x08 | 0x20 | 0x40 | 0x80
"""NVML throttle reasons from outside the code (nvml.h, nvmlClocksThrottleReason*): hardware slowdown, software and
hardware thermal slowdown, power brake. The software power cap (0x04) is left out: heavy kernels cause it."""


def turn_is_disturbed(wall_ns: int, n_threads: int, cores: int, **counted: int | None) -> bool:
    """Return whether a single turn was disturbed: `is_disturbed` of what the machine `counted` (None: does not)."""
    known = {name: count or 0 for name, count in counted.items()}
    # `kvbench ab` asks at each look, and nearly no turn lost anything: numpy is not asked of those.
    return any(known.values()) and bool(is_disturbed(**known, wall_ns=wall_ns, n_threads=n_threads, cores=cores))


def is_disturbed(
    *, steal_ns: Any, throttled_ns: Any, wall_ns: Any, n_threads: Any, cores: Any, gpu_throttle_reasons: Any = 0
) -> Any:
    """Return whether a turn of `wall_ns` was disturbed; what the machine does not count is 0.

    It is if more than `STEAL_SHARE` of wall time x threads (and more than one clock tick) was stolen, or lost to a
    container's CPU quota, or if the GPU was throttled from outside. Steal is counted on all cores, but it only falls on
    cores that have work, which in a turn are those of the case's own threads; hence threads, not cores. Of more threads
    than `cores`, those that may be used at once, only so many can lose time. A turn is never judged by its time, nor by
    context switches, page faults or stalls, which the code itself may cause.
    """
    allowed_ns = np.maximum(STEAL_SHARE * wall_ns * np.minimum(n_threads, cores), CLOCK_TICK_NS)
    return (steal_ns + throttled_ns > allowed_ns) | (gpu_throttle_reasons & GPU_SLOWDOWN_REASONS != 0)
