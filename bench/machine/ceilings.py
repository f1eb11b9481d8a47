"""The machine's roofs: how fast it reads memory and multiplies matrices, each by the fastest of several kernels.

They run in a worker, under the same threads, allocator and page size as the strategies, and take short turns beside
theirs: the memory bandwidth of a shared machine was seen to double within an hour, so a share of the roof (MFU, MBU)
compares a strategy with the roof of the same round, not with a data sheet.
"""

import gc
import math
import statistics
from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from bench.machine.clock import Clock
from bench.machine.devices import Device
from bench.machine.kernels import Kernel, random_data
from bench.manifest import CeilingName, Product
from bench.record import LEAST_READ_BYTES, MOST_READ_BYTES, MOST_READ_CACHES

TURN_S = 0.06
"""How long a turn of a kernel takes, roughly: a dozen passes over the data, and short beside the strategies' turns."""
MIN_PASSES, MAX_PASSES = 3, 200
TRIAL_S, MIN_TRIAL_PASSES = 0.005, 3
"""How long each kernel runs when the fastest is chosen, after a pass that pays for allocation and code generation. The
median pass decides, as it does in the turns: the shortest would favour small products, which neighbours seldom hit."""
MAX_PASS_S = 0.06
"""A product that would take longer at the rate seen so far is not tried: the smaller ones have reached the roof."""
UNKNOWN_CACHE_BYTES = 64 << 20
"""Assumed where the system does not say how large its last-level cache is."""
HOPELESS_S = 0.2
"""Nor is one that would take longer at the best rate of its own kind: without instructions for bfloat16, `mm` of 512 x
1,024 by 1,024 takes five seconds."""
READ_STEP_BYTES, DATA_STEP_BYTES = 1 << 15, 1 << 28
"""What a read is rounded up to, so that kernels can halve it and lay it out in rows; and the data, so that cells of
rising length do not each need new ones."""


class Ceilings:
    """Finds and times the fastest kernel of each ceiling, for a device, dtype and torch's number of threads.

    What was found for one cell is used for the next: of reads between the same powers of two the same kernel is the
    fastest, and the device's own products are tried once.
    """

    def __init__(self, device: Device, dtype: str) -> None:
        """Find nothing yet: `choose` does."""
        self.cache_bytes = device.last_level_cache_bytes() or UNKNOWN_CACHE_BYTES
        self._device, self._dtype, self._clock = device, dtype, device.clock()
        self._data: Tensor | None = None
        self._readers: dict[int, str] = {}
        """Name of the fastest read by the number of bits of its size."""
        self._rates: dict[str, float] = {}
        """FLOP per nanosecond of each kind of product, at its best."""
        self._own_product: Kernel | None = None
        """The fastest of the device's own products."""
        self._chosen: dict[CeilingName, tuple[Kernel, int]] = {}

    def choose(self, read_bytes: int | None = None, products: Sequence[Product] = ()) -> None:
        """Keep the fastest of all kernels that read so many bytes (None: far more than the caches hold) or multiply.

        `products` are tried beside the device's own. Takes about a second on the CPU, later choices less.

        Raises:
            RuntimeError: no kernel runs, or there is no memory for the data.
        """
        least = self._device.data_bytes(self.cache_bytes)
        size = least if read_bytes is None else self._clipped(read_bytes)
        needed = least if size <= least else _rounded_up(size, DATA_STEP_BYTES)
        if self._data is None or self._data.nbytes < needed:
            self._chosen, self._own_product, self._data = {}, None, None  # all of them hold the data of before
            self._data = random_data(self._device.name, self._dtype, needed)
        data = self._data
        known = self._readers.get(size.bit_length())
        reads = self._device.read_kernels(data.view(torch.uint8)[:size].view(data.dtype))
        self._chosen["read_bandwidth"] = fastest((one for one in reads if known in (None, one.name)), self._clock, {})
        self._readers[size.bit_length()] = self._chosen["read_bandwidth"][0].name
        weights = data[: least // data.itemsize]
        if self._own_product is None:
            own = self._device.gemm_kernels(weights, self._device.products)
            self._own_product, _ = fastest(own, self._clock, self._rates)
        others = self._device.gemm_kernels(weights, products)
        self._chosen["gemm"] = fastest(chain([self._own_product], others), self._clock, self._rates)
        gc.collect()

    def _clipped(self, read_bytes: int) -> int:
        most = max(MOST_READ_BYTES, MOST_READ_CACHES * self.cache_bytes)
        free = self._device.available_memory_bytes()
        if free is not None:
            most = min(most, free // 2)  # the strategies' workers need theirs
        return _rounded_up(max(LEAST_READ_BYTES, min(read_bytes, most)), READ_STEP_BYTES)

    @property
    def kernels(self) -> dict[CeilingName, str]:
        """Return the name of each chosen kernel."""
        return {ceiling: kernel.name for ceiling, (kernel, _) in self._chosen.items()}

    @torch.inference_mode()
    def take_turn(self, ceiling: CeilingName) -> tuple[int, list[int]]:
        """Time a turn: return the amount of one pass (bytes or FLOPs) and the nanoseconds of each pass."""
        kernel, passes = self._chosen[ceiling]
        return kernel.amount, time_passes(kernel, passes, self._clock)


def _rounded_up(size: int, step: int) -> int:
    return -(-size // step) * step


@torch.inference_mode()
def fastest(kernels: Iterator[Kernel], clock: Clock, rates: dict[str, float]) -> tuple[Kernel, int]:
    """Return the kernel with the highest rate, and how many of its passes make a turn.

    A kernel that this machine's torch does not have, or that finds no memory, is passed over, and so is one that would
    take too long. `rates` has the best rate of each kind so far, and is kept up.

    Raises:
        RuntimeError: no kernel runs.
    """
    best: tuple[float, Kernel] | None = None
    for kernel in kernels:
        too_large = best is not None and kernel.amount > max(best[1].amount, best[0] * MAX_PASS_S * 1e9)
        if too_large or kernel.amount > rates.get(kernel.kind, math.inf) * HOPELESS_S * 1e9:
            continue
        try:
            kernel.run(0)
            rate = _trial(kernel, clock)
        except (RuntimeError, AttributeError):  # no such operator here, not for this dtype, or out of memory
            continue
        rates[kernel.kind] = max(rate, rates.get(kernel.kind, 0.0))
        if best is None or rate > best[0]:
            best = rate, kernel
    if best is None:
        raise RuntimeError("no kernel of this ceiling runs on this machine")
    rate, kernel = best
    return kernel, min(MAX_PASSES, max(MIN_PASSES, round(TURN_S * 1e9 * rate / kernel.amount)))


def _trial(kernel: Kernel, clock: Clock) -> float:
    """Return the amount per nanosecond of the kernel's median pass."""
    times = time_passes(kernel, MIN_TRIAL_PASSES, clock)
    more = round(TRIAL_S * 1e9 / statistics.median(times)) - len(times)
    if more > 0:
        times += time_passes(kernel, min(MAX_PASSES, more), clock)
    return kernel.amount / statistics.median(times)


def time_passes(kernel: Kernel, passes: int, clock: Clock) -> list[int]:
    """Return the nanoseconds of each of some passes in a row: by CUDA events where there are any, else the host's."""
    clock.start()
    for number in range(passes):
        kernel.run(number)
        clock.stamp()
    times = clock.stop()
    return [max(1, time) for time in (times.event_ns or times.host_ns)]
