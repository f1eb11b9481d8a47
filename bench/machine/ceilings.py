"""The machine's roofs: how fast it reads memory and multiplies matrices, each by the fastest of several kernels.

They run in a worker, under the same threads, allocator and page size as the arms, and take short turns beside theirs:
the memory bandwidth of a shared machine was seen to double within an hour, so a share of the roof (MFU, MBU) compares
an arm with the roof of the same round, not with a data sheet.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.machine.clock import Clock, make_clock
from bench.record import CeilingName

TURN_S = 0.06
"""A turn of a kernel, roughly: a dozen passes over the data, and short beside the arms' turns."""
MIN_PASSES, MAX_PASSES = 3, 200
TRIAL_PASSES = 3
"""Of each kernel when the fastest is chosen, after one that pays for allocation and code generation. The fastest pass
decides, since a neighbour can only slow one down."""
MAX_PASS_S = 0.06
"""A product that would take longer at the rate seen so far is not tried: the smaller ones have reached the roof."""
CACHES, DATA_BYTES = 3, 512 << 20
"""The data are so many last-level caches large, and larger where the cache is small: what is left of them there from
the pass before must not count. With three caches of 32 MiB a read loop gave 40 GB/s, over 540 MB of weights 32."""
UNKNOWN_CACHE_BYTES = 64 << 20
"""Taken where the system does not tell the size of its last-level cache."""
CUDA_DATA_BYTES = 1 << 30
MAX_WEIGHTS = 16
"""Matrices that a product rotates through, as a model does through its layers."""
GEMM_SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "cpu": ((512, 1024), (512, 2048), (1024, 4096)),
    "cuda": ((4096, 4096), (8192, 8192)),
}
"""(rows, features in = features out), by device, the smallest first."""


@dataclass(frozen=True)
class Kernel:
    """Something to time: `run(i)` is the i-th pass, which moves `amount` bytes or does `amount` FLOPs."""

    name: str
    amount: int
    run: Callable[[int], object]


class Ceilings:
    """The fastest kernel of each ceiling for one device, dtype and number of threads (torch's current one)."""

    def __init__(self, device: str, dtype: str, cache_bytes: int | None) -> None:
        """Try every kernel and keep the fastest; takes about a second on the CPU."""
        self.cache_bytes = cache_bytes or UNKNOWN_CACHE_BYTES
        self._clock = make_clock(device)
        data = _data(torch.device(device), getattr(torch, dtype), self.cache_bytes)
        self._chosen: dict[CeilingName, tuple[Kernel, int]] = {
            "read_bandwidth": fastest(read_kernels(data), self._clock),
            "gemm": fastest(gemm_kernels(data), self._clock),
        }
        gc.collect()

    @property
    def kernels(self) -> dict[CeilingName, str]:
        """The name of each chosen kernel."""
        return {ceiling: kernel.name for ceiling, (kernel, _) in self._chosen.items()}

    @torch.inference_mode()
    def take_turn(self, ceiling: CeilingName) -> tuple[int, list[int]]:
        """The amount of one pass (bytes or FLOPs), and the nanoseconds of each pass of a turn."""
        kernel, passes = self._chosen[ceiling]
        return kernel.amount, time_passes(kernel, passes, self._clock)


@torch.inference_mode()
def fastest(kernels: Iterator[Kernel], clock: Clock) -> tuple[Kernel, int]:
    """The kernel with the highest rate, and how many of its passes make a turn.

    One that this machine's torch does not have, or that finds no memory, is passed over.

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
    """Nanoseconds of each of some passes in a row: by CUDA events where there are any, else by the host's clock."""
    clock.start()
    for number in range(passes):
        kernel.run(number)
        clock.stamp()
    times = clock.stop()
    return [max(1, time) for time in (times.event_ns or times.host_ns)]


def read_kernels(data: Tensor) -> Iterator[Kernel]:
    """Kernels that read all of `data` (one dimension) once.

    The bytes are read as float32 whatever the dtype: in bfloat16 torch's own sums are bound by conversions.
    """
    numbers = data.view(torch.float32)
    size = data.nbytes
    if data.device.type == "cuda":
        target = torch.empty_like(numbers)
        yield Kernel("sum", size, lambda _: numbers.sum())
        yield Kernel("copy", 2 * size, lambda _: target.copy_(numbers))
        return
    first, second = numbers.chunk(2)
    rows = numbers.view(-1, 4096)
    one = torch.rand(1, 4096)
    yield Kernel("dot", size, lambda _: torch.dot(first, second))
    yield Kernel("norm", size, lambda _: torch.linalg.vector_norm(numbers))
    yield Kernel("sum", size, lambda _: numbers.sum())
    yield Kernel("amax", size, lambda _: numbers.amax())
    yield Kernel("mv", size, lambda _: torch.mv(rows, one[0]))
    yield Kernel("onednn-1-row", size, lambda _: _onednn_linear(one, rows))


def gemm_kernels(data: Tensor) -> Iterator[Kernel]:
    """Products of activations with square weights that lie one after the other in `data`, in its dtype."""
    for rows, features in GEMM_SHAPES[data.device.type]:
        count = min(MAX_WEIGHTS, data.numel() // features**2)
        if count == 0:
            continue
        weights = list(data[: count * features**2].view(count, features, features))
        x = torch.rand(rows, features, device=data.device).to(data.dtype)
        amount = 2 * rows * features**2
        shape = f"{rows}x{features}x{features}"
        yield Kernel(f"mm {shape}", amount, _rotating(torch.mm, x, weights))
        if data.device.type == "cpu":
            yield Kernel(f"onednn {shape}", amount, _rotating(_onednn_linear, x, weights))
            yield Kernel(f"onednn-packed {shape}", amount, _rotating_packed(x, weights))


def _rotating(
    product: Callable[[Tensor, Tensor], Tensor], x: Tensor, weights: Sequence[Tensor]
) -> Callable[[int], Tensor]:
    return lambda number: product(x, weights[number % len(weights)])


def _rotating_packed(x: Tensor, weights: Sequence[Tensor]) -> Callable[[int], Tensor]:
    """As `_rotating`, on weights in oneDNN's own layout for so many rows; they are packed at the first pass."""
    packed: list[Tensor] = []

    def run(number: int) -> Tensor:
        if not packed:
            packed.extend(torch.ops.mkldnn._reorder_linear_weight(weight, len(x)) for weight in weights)  # noqa: SLF001
        return _onednn_linear(x, packed[number % len(packed)])

    return run


def _onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` by oneDNN, on plain or packed weights."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")  # noqa: SLF001  # its only name
    return found


def _data(device: torch.device, dtype: torch.dtype, cache_bytes: int) -> Tensor:
    """Random numbers from 0 to 1, many times over: larger than any cache, and a whole number of blocks."""
    wanted = CUDA_DATA_BYTES if device.type == "cuda" else max(CACHES * cache_bytes, DATA_BYTES)
    block = torch.rand(1 << 24, dtype=torch.float32, device=device).to(dtype)
    return block.repeat(-(-wanted // block.nbytes))
