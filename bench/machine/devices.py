"""The devices that can be measured. No other module of `bench` asks for a device's name, only for what it does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

from bench.case import DeviceName
from bench.machine.clock import Clock
from bench.machine.cpu import Cpu
from bench.machine.cuda import Cuda
from bench.machine.kernels import Kernel, Rates
from bench.manifest import Environment

if TYPE_CHECKING:
    from torch import Tensor


class Gauge(Protocol):
    """Reads a device's clock at this moment; None where that is not supported."""

    def clock_mhz(self) -> int | None:
        """Return the clock rate of its processors."""

    def throttle_reasons(self) -> int | None:
        """Return the bits that say why it is slower than it could be (NVML's clocks event reasons)."""


class Device(Protocol):
    """All that differs between devices. Importing one imports no torch; sizes are bytes, of the worker that asks."""

    @property
    def name(self) -> DeviceName:
        """Its name for users, and for torch."""

    @property
    def ceiling_dtypes(self) -> tuple[str, ...]:
        """The dtypes whose ceilings `kvbench env` shows."""

    def why_unusable(self) -> str | None:
        """Return why this machine has no such device, or None if it has one."""

    def is_in(self, environment: Environment) -> bool:
        """Return whether the machine that `environment` describes has such a device."""

    def clock(self) -> Clock:
        """Make a clock for turns on this device."""

    def gauge(self) -> Gauge | None:
        """Find what reads the device's clock rate; None where nothing does."""

    def ceiling_threads(self, cores: int) -> list[int]:
        """Return the thread counts whose ceilings `kvbench env` shows on a machine of so many cores."""

    def typical_rates(self, n_threads: int) -> Rates:
        """Return how fast such a device usually is."""

    def last_level_cache_bytes(self) -> int | None:
        """Return the size of the last cache before the device's memory; None where unknown."""

    def available_memory_bytes(self) -> int | None:
        """Return the memory that a worker can still take; None where only its allocator finds out."""

    def give_back_memory(self) -> None:
        """Return freed memory to the system or the driver."""

    def reset_peak_memory(self) -> bool:
        """Begin a new high-water mark; False where that is not possible."""

    def peak_memory_bytes(self) -> int | None:
        """Return the most memory held at once since `reset_peak_memory`; None where unknown."""

    def data_bytes(self, cache_bytes: int) -> int:
        """Return how many bytes the kernels of a ceiling go through, with a last-level cache of `cache_bytes`."""

    def read_kernels(self, data: Tensor) -> Iterator[Kernel]:
        """Make kernels that read all of `data` (one dimension) once."""

    def gemm_kernels(self, data: Tensor) -> Iterator[Kernel]:
        """Make matrix products whose weights lie in `data` (one dimension), in its dtype."""


DEVICES: Mapping[str, Device] = {"cpu": Cpu(), "cuda": Cuda()}
"""By `DeviceName`."""
