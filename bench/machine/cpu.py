"""The CPU as a device: its caches and memory, and the kernels that show how fast it reads and multiplies."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from bench.case import DeviceName
from bench.errors import UsageError
from bench.machine import cgroup
from bench.machine.cgroup import read_file
from bench.machine.clock import HostClock
from bench.machine.kernels import Kernel, Products, Rates, products, untransposed
from bench.manifest import Environment, Product

if TYPE_CHECKING:  # importing this module must not import torch: flags and reports use it
    from torch import Tensor

CPUS = Path("/sys/devices/system/cpu")
CACHES, LEAST_DATA_BYTES = 3, 512 << 20
"""Where no size is asked for, the data of a ceiling are so many last-level caches large, and larger where the cache is
small: what the pass before left there must not count. With three caches of 32 MiB a read loop gave 40 GB/s, over 540 MB
of weights 32."""


class Cpu:
    """The processor that runs this very process."""

    name: DeviceName = "cpu"
    """For users, and for torch."""
    ceiling_dtypes = ("float32", "bfloat16")
    """The dtypes whose ceilings `kvbench env` shows."""
    products: tuple[Product, ...] = ((64, 256, 256), (512, 1024, 1024), (512, 2048, 2048), (1024, 4096, 4096))
    """Those that every choice of a GEMM ceiling tries, the smallest first: it shows which kernels are hopeless."""

    def why_unusable(self) -> str | None:
        """Return why this machine has no such device, or None if it has one: there is always a CPU."""
        return None

    def is_in(self, environment: Environment) -> bool:
        """Return whether the machine that `environment` describes has such a device: every one has a CPU."""
        return True

    def clock(self) -> HostClock:
        """Make a clock for turns on this device."""
        return HostClock()

    def gauge(self) -> None:
        """Find what reads the device's clock rate and throttle reasons; None where nothing does."""
        return

    def ceiling_threads(self, cores: int) -> list[int]:
        """Return the thread counts whose ceilings `kvbench env` shows: one, and all cores."""
        return sorted({1, cores})

    def typical_rates(self, n_threads: int) -> Rates:
        """Return the rates of a middling machine: a core multiplies 80 GFLOP/s and streams 7 GB/s."""
        return Rates(flops_per_s=8e10 * n_threads, bytes_per_s=7e9 * n_threads)

    def last_level_cache_bytes(self) -> int | None:
        """Return the size of all level-3 caches together; None where the system does not say."""
        # Not py-cpuinfo's figure: on AMD that is one core's level 2.
        sizes = {}
        for folder in CPUS.glob("cpu[0-9]*/cache/index*"):
            size = re.fullmatch(r"(\d+)K", read_file(folder / "size") or "")
            if read_file(folder / "level") == "3" and size:
                sizes[read_file(folder / "shared_cpu_list")] = int(size[1]) * 1024
        return sum(sizes.values()) or None

    def available_memory_bytes(self) -> int:
        """Return the memory that this process can still take without swapping: the machine's, or its container's."""
        return int(min(machine_memory().available, cgroup.free_memory_bytes()))

    def give_back_memory(self) -> None:
        """Return what was freed to the system, so that a peak is the next case's own and other workers find room."""
        gc.collect()
        if sys.platform == "linux":
            with suppress(AttributeError):  # malloc_trim is glibc's
                ctypes.CDLL(None).malloc_trim(0)

    def reset_peak_memory(self) -> bool:
        """Begin a new high-water mark of this process; False where the system does not allow it."""
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # 5: reset VmHWM (proc(5))
        except OSError:
            return False
        return True

    def peak_memory_bytes(self) -> int | None:
        """Return the most resident memory since `reset_peak_memory`, mapped weights included; None where unknown."""
        return _resident().get("VmHWM")

    def held_memory_bytes(self) -> int | None:
        """Return the anonymous memory of this process: its mapped weights, and libraries, are pages of files.

        The weights of a model of the user's own code, and very large ones, are anonymous: compare two moments.
        """
        return _resident().get("RssAnon")

    def peak_held_bytes(self) -> int | None:
        """Return the most anonymous memory since `reset_peak_memory`, if no page of a file was read since then.

        The kernel keeps a high-water mark of all resident memory only; files' pages that were read since make this
        too low, so a peak is that of a second pass.
        """
        sizes = _resident()
        if "RssAnon" not in sizes:
            return None
        return sizes["VmHWM"] - (sizes["VmRSS"] - sizes["RssAnon"])

    def data_bytes(self, cache_bytes: int) -> int:
        """Return the size of the data for products, and for reads of no given size, with such a last-level cache."""
        return max(CACHES * cache_bytes, LEAST_DATA_BYTES)

    def read_kernels(self, data: Tensor) -> Iterator[Kernel]:
        """Make kernels that read all of `data` (one dimension) once.

        The bytes are read as float32 whatever the dtype: in bfloat16 torch's own sums are bound by conversions.
        """
        import torch

        from kvcache.compiled.products import onednn_linear

        numbers = data.view(torch.float32)
        first, second = numbers.chunk(2)
        rows, one = numbers.view(-1, 4096), torch.rand(1, 4096)
        size = data.nbytes
        yield Kernel("dot", size, lambda _: torch.dot(first, second))
        yield Kernel("norm", size, lambda _: torch.linalg.vector_norm(numbers))
        yield Kernel("sum", size, lambda _: numbers.sum())
        yield Kernel("amax", size, lambda _: numbers.amax())
        yield Kernel("mv", size, lambda _: torch.mv(rows, one[0]))
        yield Kernel("onednn-1-row", size, lambda _: onednn_linear(one, rows))

    def gemm_kernels(self, data: Tensor, shapes: Iterable[Product]) -> Iterator[Kernel]:
        """Make products of activations with weights that lie one after the other in `data`, in its dtype.

        All that `compiled` may choose is among them.
        """
        from kvcache.compiled.products import prompt_kernels

        for operands in products(data, shapes):
            for name, product in prompt_kernels(data.dtype).items():
                yield operands.rotating(name, partial(_without_bias, product))
            yield _packed(operands)
            yield operands.rotating("mm", untransposed)


def _without_bias(product: Callable[[Tensor, Tensor, Tensor | None], Tensor], x: Tensor, weight: Tensor) -> Tensor:
    """Multiply `x [rows, in]`, as a batch of one."""
    return product(x[None], weight, None)


def _packed(operands: Products) -> Kernel:
    """Make a kernel of oneDNN's products on weights in its own layout, into which the first pass brings them all."""
    import torch

    from kvcache.compiled.products import onednn_linear

    x = operands.x
    packed: list[Tensor] = []

    def run(number: int) -> Tensor:
        if not packed:
            pack = torch.ops.mkldnn._reorder_linear_weight  # noqa: SLF001  # its only name
            packed.extend(pack(weight, len(x)) for weight in operands.weights)
        return onednn_linear(x, packed[number % len(packed)])

    return Kernel(f"onednn-packed {operands.shape}", operands.flops, run)


def _resident() -> dict[str, int]:
    """Return what the kernel counts of this process's memory, in bytes (proc(5)); empty off Linux."""
    lines = read_file(Path("/proc/self/status")) or ""
    found = re.findall(r"^(VmHWM|VmRSS|RssAnon):\s+(\d+) kB$", lines, re.MULTILINE)
    return {name: int(size) * 1024 for name, size in found}


def machine_memory() -> Any:
    """Ask psutil for the machine's memory, in bytes: `total`, `available`.

    Raises:
        UsageError: Linux's /proc is not mounted.
    """
    try:
        return psutil.virtual_memory()
    except FileNotFoundError as error:
        raise UsageError(
            f"{error.filename} is not there, where Linux says how much memory and CPU time processes take: mount it, "
            "as in `mount -t proc proc /proc`"
        ) from error


def isa() -> str:
    """Return the widest vector instructions that torch uses, as in `AVX512`; imports torch."""
    import torch

    return torch.backends.cpu.get_cpu_capability()
