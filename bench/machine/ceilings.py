"""The machine's roofs: how fast it reads memory and multiplies matrices, each by the fastest of several kernels.

They run in a worker, under the same threads, allocator and page size as the arms, and take short turns beside theirs:
the memory bandwidth of a shared machine was seen to double within an hour, so a share of the roof (MFU, MBU) compares
an arm with the roof of the same round, not with a data sheet.
"""

import gc
from collections.abc import Iterator

import torch

from bench.machine.clock import Clock
from bench.machine.devices import Device
from bench.machine.kernels import Kernel, random_data
from bench.manifest import CeilingName

TURN_S = 0.06
"""How long a turn of a kernel takes, roughly: a dozen passes over the data, and short beside the arms' turns."""
MIN_PASSES, MAX_PASSES = 3, 200
TRIAL_PASSES = 3
"""Passes of each kernel when the fastest is chosen, after one that pays for allocation and code generation. The fastest
pass decides, since a neighbour can only slow one down."""
MAX_PASS_S = 0.06
"""A product that would take longer at the rate seen so far is not tried: the smaller ones have reached the roof."""
UNKNOWN_CACHE_BYTES = 64 << 20
"""Assumed where the system does not say how large its last-level cache is."""


class Ceilings:
    """Finds and times the fastest kernel of each ceiling, for a device, dtype and torch's number of threads."""

    def __init__(self, device: Device, dtype: str) -> None:
        """Try every kernel and keep the fastest; takes about a second on the CPU."""
        self.cache_bytes = device.last_level_cache_bytes() or UNKNOWN_CACHE_BYTES
        self._clock = device.clock()
        data = random_data(device.name, dtype, device.data_bytes(self.cache_bytes))
        self._chosen: dict[CeilingName, tuple[Kernel, int]] = {
            "read_bandwidth": fastest(device.read_kernels(data), self._clock),
            "gemm": fastest(device.gemm_kernels(data), self._clock),
        }
        gc.collect()

    @property
    def kernels(self) -> dict[CeilingName, str]:
        """Return the name of each chosen kernel."""
        return {ceiling: kernel.name for ceiling, (kernel, _) in self._chosen.items()}

    @torch.inference_mode()
    def take_turn(self, ceiling: CeilingName) -> tuple[int, list[int]]:
        """Time a turn: return the amount of one pass (bytes or FLOPs) and the nanoseconds of each pass."""
        kernel, passes = self._chosen[ceiling]
        return kernel.amount, time_passes(kernel, passes, self._clock)


@torch.inference_mode()
def fastest(kernels: Iterator[Kernel], clock: Clock) -> tuple[Kernel, int]:
    """Return the kernel with the highest rate, and how many of its passes make a turn.

    A kernel that this machine's torch does not have, or that finds no memory, is passed over.

    Raises:
        RuntimeError: no kernel runs.
    """
    best: tuple[float, Kernel] | None = None
    for kernel in kernels:
        if best is not None and kernel.amount > max(best[1].amount, best[0] * MAX_PASS_S * 1e9):
            continue
        try:
            kernel.run(0)
            rate = kernel.amount / min(time_passes(kernel, TRIAL_PASSES, clock))
        except (RuntimeError, AttributeError):  # no such operator here, not for this dtype, or out of memory
            continue
        if best is None or rate > best[0]:
            best = rate, kernel
    if best is None:
        raise RuntimeError("no kernel of this ceiling runs on this machine")
    rate, kernel = best
    return kernel, min(MAX_PASSES, max(MIN_PASSES, round(TURN_S * 1e9 * rate / kernel.amount)))


def time_passes(kernel: Kernel, passes: int, clock: Clock) -> list[int]:
    """Return the nanoseconds of each of some passes in a row: by CUDA events where there are any, else the host's."""
    clock.start()
    for number in range(passes):
        kernel.run(number)
        clock.stamp()
    times = clock.stop()
    return [max(1, time) for time in (times.event_ns or times.host_ns)]
