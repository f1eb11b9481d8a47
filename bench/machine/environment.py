"""The machine: what it is (Environment), what it did to a turn (CovariateReader), and how much memory there is."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import re
import resource
import subprocess
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil

from bench.machine import cgroup
from bench.machine.cgroup import read_file
from bench.machine.nvml import NvmlGpu
from bench.record import Covariates, Environment

if TYPE_CHECKING:
    import torch

_CPUS = Path("/sys/devices/system/cpu")


class TorchFacts(NamedTuple):
    """What only torch can tell of the machine."""

    isa: str
    gpu: str | None
    gpu_driver: str | None


def read_torch_facts() -> TorchFacts:
    """Ask torch, which this imports, for the widest vector instructions and the current GPU."""
    import torch

    has_gpu = torch.cuda.is_available()
    return TorchFacts(
        isa=torch.backends.cpu.get_cpu_capability(),
        gpu=torch.cuda.get_device_name() if has_gpu else None,
        gpu_driver=_gpu_driver() if has_gpu else None,
    )


def read_environment(torch_facts: TorchFacts | None = None) -> Environment:
    """Describe this machine and its software, as seen from this process.

    Takes 0.2 s, and the import of torch unless a process that has it already (a worker) gives the `torch_facts`.
    """
    facts = torch_facts or read_torch_facts()
    cpu = _cpuinfo()
    return Environment(
        hostname=platform.node(),
        os=platform.platform(),
        cpu_model=str(cpu.get("brand_raw") or platform.processor() or platform.machine()),
        cores=usable_cores(),
        isa=facts.isa,
        l3_bytes=_l3_bytes(),
        memory_bytes=psutil.virtual_memory().total,
        python=platform.python_version(),
        torch=importlib.metadata.version("torch"),
        transformers=importlib.metadata.version("transformers"),
        gpu=facts.gpu,
        gpu_driver=facts.gpu_driver,
        git_commit=git_commit(),
        load_1min=psutil.getloadavg()[0],
        governor=read_file(_CPUS / "cpu0/cpufreq/scaling_governor"),
        transparent_hugepage=_transparent_hugepage(),
        kvbench=importlib.metadata.version("kvbench"),
    )


def usable_cores() -> int:
    """Logical cores that this process may use: its affinity, cut by a container's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return math.ceil(min(cores, cgroup.cpu_quota()))


def last_level_cache_bytes(device: str | torch.device) -> int | None:
    """The last cache before the device's memory: all level-3 caches of the CPU, level 2 on CUDA; None: not known."""
    if _is_cuda(device):
        import torch

        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return _l3_bytes()


def available_memory_bytes() -> int:
    """Memory that this process can still take without swapping: the machine's, cut by a container's limit."""
    return int(min(psutil.virtual_memory().available, cgroup.free_memory_bytes()))


def reset_peak_memory(device: str | torch.device) -> bool:
    """Begin a new high-water mark of this process; False where the system cannot (then there is no peak to be had)."""
    if _is_cuda(device):
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # 5: reset VmHWM (proc(5))
    except OSError:
        return False
    return True


def peak_memory_bytes(device: str | torch.device) -> int | None:
    """Most memory held at once since `reset_peak_memory`.

    On the CPU the resident memory of this process, mapped weights included; on CUDA what torch's allocator held.
    None where the system does not tell.
    """
    if _is_cuda(device):
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    peak = re.search(r"^VmHWM:\s+(\d+) kB$", read_file(Path("/proc/self/status")) or "", re.MULTILINE)
    return int(peak[1]) * 1024 if peak else None


class CovariateReader:
    """What the machine did to this process between `start` and `stop`; both are called outside the timed region.

    Made once per worker, since finding the GPU takes a while.
    """

    def __init__(self, device: str | torch.device) -> None:
        """Find the counters; on CUDA, clocks and throttle reasons need NVML (the package nvidia-ml-py)."""
        self._gpu = NvmlGpu.current() if _is_cuda(device) else None
        self._before = _Counters(None, None, 0, 0)

    def start(self) -> None:
        """Read the counters before a turn."""
        self._before = _Counters.read()

    def stop(self) -> Covariates:
        """Read them after it; the GPU's clock and throttle reasons are those of this moment."""
        after, before = _Counters.read(), self._before
        return Covariates(
            steal_ns=_difference(after.steal_ns, before.steal_ns),
            stall_ns=_difference(after.stall_ns, before.stall_ns),
            involuntary_switches=after.involuntary_switches - before.involuntary_switches,
            page_faults=after.page_faults - before.page_faults,
            gpu_clock_mhz=self._gpu.clock_mhz() if self._gpu else None,
            gpu_throttle_reasons=self._gpu.throttle_reasons() if self._gpu else None,
        )


class _Counters(NamedTuple):
    """Totals since boot (the first two) and since the process began."""

    steal_ns: int | None
    stall_ns: int | None
    involuntary_switches: int
    page_faults: int

    @classmethod
    def read(cls) -> _Counters:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        # cpu user nice system idle iowait irq softirq steal guest guest_nice, in ticks (proc(5)).
        cpu = (read_file(Path("/proc/stat"), 512) or "").partition("\n")[0].split()
        has_steal = len(cpu) > 8
        stall = re.match(r"some .* total=(\d+)", read_file(Path("/proc/pressure/cpu")) or "")  # microseconds
        return cls(
            steal_ns=int(cpu[8]) * (1_000_000_000 // os.sysconf("SC_CLK_TCK")) if has_steal else None,
            stall_ns=int(stall[1]) * 1000 if stall else None,
            involuntary_switches=usage.ru_nivcsw,
            page_faults=usage.ru_minflt + usage.ru_majflt,
        )


@cache
def _cpuinfo() -> dict[str, Any]:
    """py-cpuinfo's findings; cached, since it starts other programs."""
    import cpuinfo

    return dict(cpuinfo.get_cpu_info())


def _l3_bytes() -> int | None:
    """All level-3 caches together. Not py-cpuinfo's: on AMD it takes one core's level 2 for it."""
    sizes = {}
    for folder in _CPUS.glob("cpu[0-9]*/cache/index*"):
        size = re.fullmatch(r"(\d+)K", read_file(folder / "size") or "")
        if read_file(folder / "level") == "3" and size:
            sizes[read_file(folder / "shared_cpu_list")] = int(size[1]) * 1024
    return sum(sizes.values()) or None


def _transparent_hugepage() -> str | None:
    chosen = re.search(r"\[(\w+)\]", read_file(Path("/sys/kernel/mm/transparent_hugepage/enabled")) or "")
    return chosen[1] if chosen else None


def _gpu_driver() -> str | None:
    version = re.search(r"\b\d{3,}\.\d+(?:\.\d+)?\b", read_file(Path("/proc/driver/nvidia/version")) or "")
    return version[0] if version else None


def git_commit() -> str | None:
    """The current folder's commit, `+` where tracked files differ; None outside a repository or without git."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _is_cuda(device: str | torch.device) -> bool:
    return str(device).startswith("cuda")


def _difference(after: int | None, before: int | None) -> int | None:
    return None if after is None or before is None else after - before
