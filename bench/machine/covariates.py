"""What the machine did to a turn while it ran: counters read before and after it."""

from __future__ import annotations

import os
import re
import resource
from pathlib import Path
from typing import NamedTuple

from bench.machine import cgroup
from bench.machine.cgroup import read_file
from bench.machine.devices import Device
from bench.record import Covariates


class CovariateReader:
    """Reads what the machine did to this process between `start` and `stop`, both outside the timed region.

    Made once per worker, since finding the GPU takes a while.
    """

    def __init__(self, device: Device) -> None:
        """Find the counters; on CUDA, clocks and throttle reasons need NVML (the package nvidia-ml-py)."""
        self._gauge = device.gauge()
        self._groups = cgroup.groups_with_quota()
        self._before = self._read()

    def start(self) -> None:
        """Read the counters before a turn."""
        self._before = self._read()

    def stop(self) -> Covariates:
        """Read them after it; the GPU's clock and throttle reasons are those of this moment."""
        after, before = self._read(), self._before
        return Covariates(
            steal_ns=_difference(after.steal_ns, before.steal_ns),
            stall_ns=_difference(after.stall_ns, before.stall_ns),
            involuntary_switches=after.involuntary_switches - before.involuntary_switches,
            page_faults=after.page_faults - before.page_faults,
            throttled_periods=_difference(after.throttled_periods, before.throttled_periods),
            throttled_ns=_difference(after.throttled_ns, before.throttled_ns),
            gpu_clock_mhz=self._gauge.clock_mhz() if self._gauge else None,
            gpu_throttle_reasons=self._gauge.throttle_reasons() if self._gauge else None,
        )

    def _read(self) -> _Counters:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        # cpu user nice system idle iowait irq softirq steal guest guest_nice, in ticks (proc(5)).
        cpu = (read_file(Path("/proc/stat"), 512) or "").partition("\n")[0].split()
        has_steal = len(cpu) > 8
        stall = re.match(r"some .* total=(\d+)", read_file(Path("/proc/pressure/cpu")) or "")  # microseconds
        throttling = cgroup.throttling(self._groups)
        return _Counters(
            steal_ns=int(cpu[8]) * (1_000_000_000 // os.sysconf("SC_CLK_TCK")) if has_steal else None,
            stall_ns=int(stall[1]) * 1000 if stall else None,
            throttled_periods=throttling.periods if throttling else None,
            throttled_ns=throttling.ns if throttling else None,
            involuntary_switches=usage.ru_nivcsw,
            page_faults=usage.ru_minflt + usage.ru_majflt,
        )


class _Counters(NamedTuple):
    """Totals since boot (the first two), since the control groups were made, and since the process began."""

    steal_ns: int | None
    stall_ns: int | None
    throttled_periods: int | None
    throttled_ns: int | None
    involuntary_switches: int
    page_faults: int


def _difference(after: int | None, before: int | None) -> int | None:
    return None if after is None or before is None else after - before
