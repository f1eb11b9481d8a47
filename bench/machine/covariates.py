"""What the machine did to a turn while it ran: counters read before and after it."""

import os
import re
import resource
from pathlib import Path

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
        pairs = ((name, self._before[name], now) for name, now in self._read().items())
        differences = {name: None if before is None or now is None else now - before for name, before, now in pairs}
        return Covariates(
            **differences,
            gpu_clock_mhz=self._gauge.clock_mhz() if self._gauge else None,
            gpu_throttle_reasons=self._gauge.throttle_reasons() if self._gauge else None,
        )

    def _read(self) -> dict[str, int | None]:
        """Read the totals since boot (the first two), since the control groups were made, and of this process."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        # cpu user nice system idle iowait irq softirq steal guest guest_nice, in ticks (proc(5)).
        cpu = (read_file(Path("/proc/stat"), 512) or "").partition("\n")[0].split()
        stall = re.match(r"some .* total=(\d+)", read_file(Path("/proc/pressure/cpu")) or "")  # microseconds
        throttling = cgroup.throttling(self._groups)
        return {
            "steal_ns": int(cpu[8]) * (1_000_000_000 // os.sysconf("SC_CLK_TCK")) if len(cpu) > 8 else None,
            "stall_ns": int(stall[1]) * 1000 if stall else None,
            "throttled_periods": throttling.periods if throttling else None,
            "throttled_ns": throttling.ns if throttling else None,
            "involuntary_switches": usage.ru_nivcsw,
            "page_faults": usage.ru_minflt + usage.ru_majflt,
        }
