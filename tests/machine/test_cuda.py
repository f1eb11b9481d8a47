"""CUDA's clock, memory, driver and NVML: on stand-ins, and where there is a GPU on it."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from itertools import count

import pytest
import torch

from bench.machine import cuda as cuda_module
from bench.machine.clock import Clock, Times
from bench.machine.covariates import CovariateReader
from bench.machine.cuda import Cuda, CudaClock, gpu_driver

CUDA = Cuda()


class FakeCuda:
    """A device that works through its queue only when it is waited for: each piece of work takes 3 ms.

    Stands in for torch.cuda: what CudaClock may not do (wait inside a phase, make events in a timed region) shows up in
    `log`.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.work_done_ns = 0

    def current_stream(self, device: torch.device) -> str:
        return "stream"

    def synchronize(self, device: torch.device) -> None:
        self.log.append("synchronize")

    def Event(self, *, enable_timing: bool) -> FakeEvent:  # noqa: N802  the name is torch's
        assert enable_timing
        self.log.append("new event")
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.at_ns = 0

    def record(self, stream: str) -> None:
        assert stream == "stream"
        self.cuda.log.append("record")
        self.cuda.work_done_ns += 3_000_000
        self.at_ns = self.cuda.work_done_ns

    def elapsed_time(self, later: FakeEvent) -> float:
        return (later.at_ns - self.at_ns) / 1e6


@pytest.fixture
def host_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The host's clock moves by 1000 ns at each look."""
    ticks = count(0, 1000)
    monkeypatch.setattr(cuda_module, "perf_counter_ns", lambda: next(ticks))
    return ticks


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(torch, "cuda", fake)
    return fake


def turn(clock: Clock, n_decode: int = 3) -> Times:
    clock.start()
    clock.stamp(end_of_phase=True)
    for _ in range(n_decode):
        clock.stamp()
    return clock.stop()


@pytest.mark.usefixtures("host_time")
def test_cuda_clock_waits_at_phase_ends_only(cuda):
    clock = CudaClock(n_stamps=4)
    cuda.log.clear()
    turn(clock)
    assert cuda.log == [
        *["synchronize", "record"],  # start: the device is idle
        *["record", "synchronize"],  # end of the prefill
        *["record", "record", "record"],  # decode steps run on without a look at the device
        "synchronize",  # stop
    ]


@pytest.mark.usefixtures("host_time")
def test_cuda_clock_keeps_host_and_event_times(cuda):
    times = turn(CudaClock(n_stamps=4))
    assert times.event_ns == [3_000_000] * 4
    # The last stamp is taken again after the wait: the sum over decode is until the device is done.
    assert times.host_ns == [1000, 1000, 1000, 2000]


@pytest.mark.usefixtures("host_time")
def test_cuda_clock_leaves_the_last_stamp_of_a_closed_phase(cuda):
    clock = CudaClock(n_stamps=4)
    clock.start()
    clock.stamp(end_of_phase=True)
    assert clock.stop().host_ns == [1000]


def test_cuda_clock_makes_its_events_before_the_turns(cuda):
    clock = CudaClock(n_stamps=4)
    cuda.log.clear()
    turn(clock)
    turn(clock)
    assert "new event" not in cuda.log


def test_cuda_clock_grows_once_for_a_longer_turn(cuda):
    clock = CudaClock(n_stamps=2)
    assert len(turn(clock, n_decode=5).event_ns or []) == 6
    cuda.log.clear()
    assert turn(clock, n_decode=5).event_ns == [3_000_000] * 6
    assert "new event" not in cuda.log


@pytest.mark.cuda
def test_cuda_clock_on_a_gpu():
    """Event and host times agree over a phase, and a step's launch is shorter than its run."""
    clock = CudaClock()
    matrix = torch.rand(4096, 4096, device="cuda")
    for _ in range(2):  # the first turn warms up
        clock.start()
        product = matrix @ matrix
        clock.stamp(end_of_phase=True)
        for _ in range(8):
            product = product @ matrix
            clock.stamp()
        times = clock.stop()
    assert times.event_ns is not None
    assert sum(times.host_ns[1:]) == pytest.approx(sum(times.event_ns[1:]), rel=0.2)
    assert min(times.event_ns[1:]) > times.host_ns[1]


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024", "535.183.01"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65  Release Build  (root@x)", "580.65"),
    ],
)
def test_gpu_driver(files, text, version):
    assert gpu_driver() is None
    files({"/proc/driver/nvidia/version": text})
    assert gpu_driver() == version


@pytest.mark.cuda
def test_peak_memory_on_a_gpu():
    assert CUDA.reset_peak_memory()
    before = CUDA.peak_memory_bytes()
    block = torch.empty(2**20, device="cuda")
    del block
    assert CUDA.peak_memory_bytes() >= before + 4 * 2**20


class FakeNvml(types.ModuleType):
    """The three questions that are asked of NVML."""

    NVML_CLOCK_SM = 1

    class NVMLError(Exception):
        pass

    def __init__(self, *, knows_uuid: bool = True, knows_throttle: bool = True) -> None:
        super().__init__("pynvml")
        self.knows_uuid, self.knows_throttle = knows_uuid, knows_throttle

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        assert uuid == "GPU-1234"
        if not self.knows_uuid:
            raise self.NVMLError
        return "handle"

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:  # noqa: N802
        assert (handle, kind) == ("handle", 1)
        return 1980

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:  # noqa: N802
        if not self.knows_throttle:
            raise self.NVMLError
        return 4


@pytest.mark.parametrize(
    ("nvml", "expected"),
    [
        (FakeNvml(), (1980, 4)),
        (FakeNvml(knows_throttle=False), (1980, None)),
        (FakeNvml(knows_uuid=False), (None, None)),
        (None, (None, None)),
    ],
    ids=["all", "no throttle reasons", "unknown GPU", "not installed"],
)
def test_gpu_covariates(monkeypatch, nvml, expected):
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="1234"))
    reader = CovariateReader(CUDA)
    reader.start()
    found = reader.stop()
    assert (found.gpu_clock_mhz, found.gpu_throttle_reasons) == expected
