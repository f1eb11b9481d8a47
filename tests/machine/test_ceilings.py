"""The kernels do what their amounts say, the fastest wins, what a machine lacks is passed over. No time asserted."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.machine import ceilings
from bench.machine.ceilings import Ceilings, fastest, time_passes
from bench.machine.clock import Clock, Times
from bench.machine.cpu import CACHES, Cpu
from bench.machine.cuda import Cuda
from bench.machine.kernels import Kernel
from kvcache.compiled.products import PROMPT
from tests import small_kernels

DTYPES = [torch.float32, torch.bfloat16]


class WorkClock:
    """Time passes only by `work`."""

    def __init__(self) -> None:
        self.now_ns, self.marks = 0, [0]

    def work(self, elapsed_ns: int) -> None:
        self.now_ns += elapsed_ns

    def start(self) -> None:
        self.marks = [self.now_ns]

    def stamp(self, *, end_of_phase: bool = False) -> None:
        self.marks.append(self.now_ns)

    def stop(self) -> Times:
        return Times(host_ns=[after - before for before, after in itertools.pairwise(self.marks)], event_ns=None)


def data(dtype: torch.dtype) -> torch.Tensor:
    """Two matrices of 128 x 128 in `dtype`."""
    return torch.rand(2 * 128 * 128).to(dtype)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    small_kernels.use(monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_read_kernel_sees_every_byte(dtype: torch.dtype) -> None:
    """A NaN anywhere comes out: what a kernel does not read it cannot notice."""
    buffer = data(dtype)
    numbers = buffer.view(torch.float32)
    for kernel in Cpu().read_kernels(buffer):
        assert kernel.amount == buffer.nbytes
        for place in (0, len(numbers) // 2 - 1, len(numbers) // 2, len(numbers) - 1):
            kept = numbers[place].clone()
            numbers[place] = torch.nan
            assert torch.as_tensor(kernel.run(0)).isnan().any(), kernel.name
            numbers[place] = kept
        assert not torch.as_tensor(kernel.run(0)).isnan().any(), kernel.name


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_product_is_one_and_takes_the_flops_it_says(dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 products on this CPU")
    kernels = list(Cpu().gemm_kernels(data(dtype), [(64, 128, 32)]))
    plain = [name for name in PROMPT if dtype == torch.bfloat16 or "wide" not in name]
    assert [kernel.kind for kernel in kernels] == [*plain, "onednn-packed", "mm"]
    assert {kernel.name.split()[1] for kernel in kernels} == {"64x128x32"}
    with FlopCounterMode(display=False) as counter:
        product = kernels[-1].run(0)
    assert counter.get_total_flops() == kernels[-1].amount
    assert isinstance(product, torch.Tensor)
    assert product.shape == (64, 32)
    for number in (0, 1):  # the second matrix: plain and packed weights rotate alike; mm takes them untransposed
        first, *others = (torch.as_tensor(kernel.run(number)).flatten() for kernel in kernels[:-1])
        for other in others:
            torch.testing.assert_close(first, other, rtol=2e-2, atol=1e-2)
    assert not torch.equal(torch.as_tensor(kernels[0].run(0)), torch.as_tensor(kernels[0].run(1)))


def test_bfloat16_is_multiplied_in_float32_too() -> None:
    """On a processor without products of it: there this is the fastest."""
    kernels = {kernel.kind: kernel for kernel in Cpu().gemm_kernels(data(torch.bfloat16), [(8, 64, 64)])}
    linear, wide = (torch.as_tensor(kernels[kind].run(0)) for kind in ("linear", "linear-wide"))
    assert (wide.dtype, wide.shape) == (torch.bfloat16, linear.shape)
    torch.testing.assert_close(linear, wide, rtol=2e-2, atol=1e-2)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ceilings_of_this_machine(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setattr(Cpu, "last_level_cache_bytes", lambda _: 1 << 20)
    found = Ceilings(Cpu(), dtype)
    found.choose()
    assert found.cache_bytes == 1 << 20
    amount, pass_ns = found.take_turn("read_bandwidth")
    assert amount >= CACHES << 20
    assert len(pass_ns) >= 3
    assert min(pass_ns) > 0
    amount, _ = found.take_turn("gemm")
    rows, n_in, n_out = map(int, found.kernels["gemm"].split()[1].split("x"))
    assert amount == 2 * rows * n_in * n_out


def ask_for(monkeypatch: pytest.MonkeyPatch, free_bytes: int | None, *sizes: int | None) -> list[int]:
    """Return what the reads go through, one after the other, with a last-level cache of 1 MiB."""
    monkeypatch.setattr(Cpu, "last_level_cache_bytes", lambda _: 1 << 20)
    monkeypatch.setattr(Cpu, "available_memory_bytes", lambda _: free_bytes)
    monkeypatch.setattr(ceilings, "LEAST_READ_BYTES", 1 << 17)
    monkeypatch.setattr(ceilings, "MOST_READ_BYTES", 1 << 20)
    monkeypatch.setattr(ceilings, "DATA_STEP_BYTES", 1 << 20)
    found, read = Ceilings(Cpu(), "float32"), []
    for size in sizes:
        found.choose(size)
        read.append(found.take_turn("read_bandwidth")[0])
    return read


@pytest.mark.usefixtures("small")
def test_a_read_is_as_large_as_asked_for_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    least, step, most = 1 << 17, 1 << 15, 4 << 20  # four caches are more than 1 MiB here
    asked = [1, least, least + 1, 3 << 20, most + 1, 1 << 40, least]
    assert ask_for(monkeypatch, None, *asked) == [least, least, least + step, 3 << 20, most, most, least]
    assert ask_for(monkeypatch, None, None) == [CACHES << 20]


@pytest.mark.usefixtures("small")
def test_a_read_takes_no_more_than_half_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask_for(monkeypatch, 2 << 20, 3 << 20) == [1 << 20]
    assert ask_for(monkeypatch, 0, 3 << 20) == [1 << 17]


@pytest.mark.usefixtures("small")
def test_a_later_choice_tries_only_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of reads of about one size one kernel, of the device's own products the fastest; the model's all of them."""
    tried: list[list[str]] = []

    def watched(kernels: Iterator[Kernel], clock: Clock, rates: dict[str, float]) -> tuple[Kernel, int]:
        given = list(kernels)
        tried.append([kernel.name for kernel in given])
        return fastest(iter(given), clock, rates)

    monkeypatch.setattr(ceilings, "fastest", watched)
    monkeypatch.setattr(ceilings, "DATA_STEP_BYTES", 8 << 20)
    monkeypatch.setattr(Cpu, "last_level_cache_bytes", lambda _: 1 << 20)
    found = Ceilings(Cpu(), "float32")
    found.choose(5 << 20, [(8, 64, 32)])
    reads, own, gemms = tried
    assert len(reads) > 1
    assert {name.split()[1] for name in own} == {"64x128x128", "64x256x256"}
    assert [name.split()[1] for name in gemms[1:]] == ["8x64x32"] * 5
    tried.clear()
    found.choose(6 << 20, [(16, 64, 32)])
    assert [len(names) for names in tried] == [1, 1 + 5]
    assert tried[0][0] in reads
    assert tried[1][0] == gemms[0]
    tried.clear()
    found.choose(9 << 20)  # another power of two, and more than the data: everything anew
    assert [len(names) for names in tried] == [len(reads), len(own), 1]


def test_the_copy_of_a_gpu_moves_as_many_bytes_as_a_read() -> None:
    buffer = torch.rand(1024)
    copy = next(kernel for kernel in Cuda().read_kernels(buffer) if kernel.name == "copy")
    assert copy.amount == buffer.nbytes
    copy.run(0)
    assert torch.equal(*buffer.chunk(2))


def test_the_data_are_larger_than_any_cache() -> None:
    assert Cpu().data_bytes(1 << 20) == 512 << 20
    assert Cpu().data_bytes(1 << 30) == CACHES << 30


@pytest.mark.usefixtures("small")
def test_a_cache_of_unknown_size_is_taken_for_a_large_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cpu, "last_level_cache_bytes", lambda _: None)
    monkeypatch.setattr(Cpu, "data_bytes", lambda _, cache_bytes: cache_bytes // 64)
    found = Ceilings(Cpu(), "float32")
    found.choose()
    assert found.cache_bytes == found.take_turn("read_bandwidth")[0] * 64 == 64 << 20


def kernel(name: str, amount: int, clock: WorkClock, pass_ns: int) -> Kernel:
    return Kernel(name, amount, lambda _: clock.work(pass_ns))


def test_the_fastest_is_the_one_with_the_highest_rate() -> None:
    clock = WorkClock()
    slow, fast = kernel("slow", 1000, clock, 10_000_000), kernel("fast", 4000, clock, 20_000_000)
    assert fastest(iter([slow, fast]), clock, {}) == (fast, 3)
    assert fastest(iter([fast, slow]), clock, {}) == (fast, 3)


def test_a_stalled_pass_does_not_decide() -> None:
    clock = WorkClock()
    stalls = itertools.chain([10**6] * 2, [10**9], itertools.repeat(10**6))
    good = Kernel("good", 2000, lambda _: clock.work(next(stalls)))
    best, passes = fastest(iter([kernel("poor", 1000, clock, 10**6), good]), clock, {})
    assert (best, passes) == (good, 60)


def test_what_this_torch_lacks_is_passed_over_and_without_any_kernel_there_is_an_error() -> None:
    clock = WorkClock()

    def lacking(_: int) -> None:
        raise NotImplementedError

    good = kernel("good", 1, clock, 1000)
    assert fastest(iter([Kernel("lacking", 10, lacking), good]), clock, {})[0] == good
    with pytest.raises(RuntimeError, match="no kernel"):
        fastest(iter([Kernel("lacking", 10, lacking)]), clock, {})


def test_a_product_too_large_for_a_short_turn_is_not_tried() -> None:
    clock = WorkClock()
    small = kernel("small", 1000, clock, 10_000_000)

    def too_large(_: int) -> None:
        raise AssertionError

    assert fastest(iter([small, Kernel("large", 7000, too_large)]), clock, {})[0] == small


def test_a_kind_that_is_far_too_slow_is_not_tried_at_a_larger_shape() -> None:
    clock, rates = WorkClock(), dict[str, float]()
    small = [kernel("good 1", 1000, clock, 1_000), kernel("poor 1", 1000, clock, 20_000_000)]

    def again(_: int) -> None:
        raise AssertionError

    large = [Kernel("poor 2", 60_000, again), kernel("good 2", 60_000, clock, 50_000)]
    assert fastest(iter(small + large), clock, rates)[0] == large[1]
    assert rates == {"good": 1.2, "poor": 5e-5}
    assert fastest(iter(large), clock, rates)[0] == large[1]


def test_every_pass_has_a_time_of_its_own() -> None:
    clock = WorkClock()
    seen: list[int] = []

    def run(number: int) -> None:
        seen.append(number)
        clock.work(100 * (number + 1))

    assert time_passes(Kernel("k", 1, run), 3, clock) == [100, 200, 300]
    assert seen == [0, 1, 2]


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_ceilings_of_a_gpu(dtype: str) -> None:
    found = Ceilings(Cuda(), dtype)
    found.choose(1 << 29, [(512, 4096, 11008)])
    for ceiling in ("read_bandwidth", "gemm"):
        amount, pass_ns = found.take_turn(ceiling)
        assert amount / min(pass_ns) > 1
