"""An NVIDIA GPU as a device: CUDA events as its clock, torch's allocator, its kernels, and NVML for what slows it."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

from bench.case import DeviceName
from bench.machine.cgroup import read_file
from bench.machine.clock import Times, intervals
from bench.machine.kernels import Kernel, Rates, products, untransposed
from bench.manifest import Environment, Product

if TYPE_CHECKING:  # importing this module must not import torch: flags and reports use it
    import torch
    from torch import Tensor

DATA_BYTES = 1 << 30


class Cuda:
    """The GPU that torch calls current; its members are those of `Cpu`."""

    name: DeviceName = "cuda"
    ceiling_dtypes = ("float32", "bfloat16", "float16")
    products: tuple[Product, ...] = ((4096, 4096, 4096), (8192, 8192, 8192))

    def why_unusable(self) -> str | None:
        import torch

        return None if torch.cuda.is_available() else "torch finds no CUDA device on this machine"

    def is_in(self, environment: Environment) -> bool:
        return environment.gpu is not None

    def clock(self) -> CudaClock:
        return CudaClock()

    def gauge(self) -> NvmlGpu | None:
        return NvmlGpu.current()

    def ceiling_threads(self, cores: int) -> list[int]:
        """Return one count: no thread computes here."""
        return [cores]

    def typical_rates(self, n_threads: int) -> Rates:
        """Return the rates of a middling GPU: 100 TFLOP/s and 1 TB/s."""
        return Rates(flops_per_s=1e14, bytes_per_s=1e12)

    def last_level_cache_bytes(self) -> int | None:
        """Return the size of the level-2 cache."""
        import torch

        return int(torch.cuda.get_device_properties("cuda").L2_cache_size)

    def available_memory_bytes(self) -> None:
        """Return None: how much is free counts once a worker allocates it, and its allocator says so."""
        return

    def give_back_memory(self) -> None:
        import torch

        gc.collect()
        torch.cuda.empty_cache()

    def reset_peak_memory(self) -> bool:
        import torch

        torch.cuda.reset_peak_memory_stats()
        return True

    def peak_memory_bytes(self) -> int:
        """Return the most that torch's allocator held at once since `reset_peak_memory`."""
        import torch

        return int(torch.cuda.max_memory_allocated())

    def held_memory_bytes(self) -> int:
        """Return what torch's allocator holds now."""
        import torch

        return int(torch.cuda.memory_allocated())

    def peak_held_bytes(self) -> int:
        """Return the most that torch's allocator held at once since `reset_peak_memory`."""
        return self.peak_memory_bytes()

    def data_bytes(self, cache_bytes: int) -> int:
        """Return the size of the data for products, and for reads of no given size: many times any level-2 cache."""
        return DATA_BYTES

    def read_kernels(self, data: Tensor) -> Iterator[Kernel]:
        """Make kernels that read all of `data` (one dimension) once, or copy one half of it over the other."""
        import torch

        numbers = data.view(torch.float32)
        source, target = numbers.chunk(2)
        yield Kernel("sum", data.nbytes, lambda _: numbers.sum())
        yield Kernel("copy", data.nbytes, lambda _: target.copy_(source))

    def gemm_kernels(self, data: Tensor, shapes: Iterable[Product]) -> Iterator[Kernel]:
        from torch.nn.functional import linear

        for operands in products(data, shapes):
            yield operands.rotating("linear", linear)
            yield operands.rotating("mm", untransposed)


class CudaClock:
    """Host time and a CUDA event per stamp; the host waits for the device at the ends of phases only.

    Events are made before the first turn and used again in each, so that none is created in a timed region.
    """

    def __init__(self, device: str | torch.device = "cuda", n_stamps: int = 256) -> None:
        """Make events for `n_stamps` stamps a turn; a longer turn makes more on its way, once."""
        # Not at the top: the driver and the report side read `Times` where torch cannot be imported.
        import torch

        self._cuda = torch.cuda
        self._device = torch.device(device)
        self._stream = torch.cuda.current_stream(self._device)
        self._events = [self._new_event() for _ in range(n_stamps + 1)]
        self._marks: list[int] = []
        self._phase_open = False

    def start(self) -> None:
        self._stream = self._cuda.current_stream(self._device)
        self._marks = []
        self._cuda.synchronize(self._device)
        self._record()
        self._marks.append(perf_counter_ns())
        self._phase_open = False

    def stamp(self, *, end_of_phase: bool = False) -> None:
        """Mark that a token is done, in the device's order of work; with `end_of_phase`, wait until it is."""
        self._record()
        if end_of_phase:
            self._cuda.synchronize(self._device)
        self._marks.append(perf_counter_ns())
        self._phase_open = not end_of_phase

    def stop(self) -> Times:
        """Wait for the device, let the latest stamp end now if its phase is still open, and return all times."""
        self._cuda.synchronize(self._device)
        if self._phase_open:
            self._marks[-1] = perf_counter_ns()
            self._phase_open = False
        used = self._events[: len(self._marks)]
        # elapsed_time is in milliseconds, to half a microsecond.
        event_ns = [round(before.elapsed_time(after) * 1e6) for before, after in pairwise(used)]
        return Times(host_ns=intervals(self._marks), event_ns=event_ns)

    def _record(self) -> None:
        n_used = len(self._marks)
        if n_used == len(self._events):
            self._events.append(self._new_event())
        self._events[n_used].record(self._stream)

    def _new_event(self) -> torch.cuda.Event:
        event = self._cuda.Event(enable_timing=True)
        event.record(self._stream)  # torch makes the CUDA event at its first record
        return event


class NvmlGpu:
    """Reads the clock rate of one GPU, and why it is not higher; each None where NVML does not support it."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    @classmethod
    def current(cls) -> NvmlGpu | None:
        """Find the GPU that torch uses by its UUID (CUDA_VISIBLE_DEVICES renumbers); None without the package."""
        try:
            import pynvml
        except ImportError:
            return None
        import torch

        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        try:
            pynvml.nvmlInit()
            return cls(pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
        except pynvml.NVMLError:
            return None

    def clock_mhz(self) -> int | None:
        """Return the clock rate of the multiprocessors now."""
        return self._ask("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_SM)

    def throttle_reasons(self) -> int | None:
        """Return the bits of NVML's clocks event reasons now."""
        return self._ask("nvmlDeviceGetCurrentClocksThrottleReasons")

    def _ask(self, question: str, *details: int) -> int | None:
        try:
            return int(getattr(self._nvml, question)(self._handle, *details))
        except self._nvml.NVMLError:  # not supported on this card, or in this container
            return None


def gpu_name() -> str | None:
    """Return the name of the GPU that torch would use, or None without one; imports torch."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def gpu_driver() -> str | None:
    """Return the version of NVIDIA's kernel module; None where there is none."""
    version = re.search(r"\b\d{3,}\.\d+(?:\.\d+)?\b", read_file(Path("/proc/driver/nvidia/version")) or "")
    return version[0] if version else None
