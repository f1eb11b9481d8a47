from __future__ import annotations

import re
import subprocess
import sys
import time
import types
from pathlib import Path

import msgspec
import psutil
import pytest
import torch

from bench.machine import cgroup, environment
from bench.machine.environment import (
    CovariateReader,
    TorchFacts,
    available_memory_bytes,
    peak_memory_bytes,
    read_environment,
    read_torch_facts,
    reset_peak_memory,
    usable_cores,
)
from bench.record import Covariates, Environment

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which is Linux's")
FACTS = TorchFacts(isa="AVX2", gpu="NVIDIA Test", gpu_driver="580.1")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Write kernel files under a folder that stands in for the root; absolute paths are looked up there."""

    class Rooted(type(Path())):
        def __new__(cls, *parts: str):
            path = Path(*parts)
            return tmp_path / path.relative_to("/") if path.is_absolute() else path

    monkeypatch.setattr(environment, "Path", Rooted)
    monkeypatch.setattr(cgroup, "Path", Rooted)
    monkeypatch.setattr(environment, "_CPUS", tmp_path / "sys/devices/system/cpu")

    def write(contents: dict[str, str]) -> None:
        for name, text in contents.items():
            path = tmp_path / name.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


def test_environment_of_this_machine_is_complete_and_survives_storage():
    found = read_environment()
    assert found.cores >= 1
    assert found.cpu_model
    assert found.memory_bytes == psutil.virtual_memory().total
    assert torch.__version__.startswith(found.torch)  # PyPI's CUDA build is 2.13.0 there, and calls itself 2.13.0+cu130
    assert found.isa == torch.backends.cpu.get_cpu_capability()
    assert re.fullmatch(r"\d+\.\d+\.\d+", found.kvbench)
    assert msgspec.json.decode(msgspec.json.encode(found), type=Environment) == found


def test_equal_machines_have_equal_fingerprints():
    first, second = read_environment(FACTS), read_environment(FACTS)
    assert first.fingerprint == second.fingerprint


def test_torch_is_not_asked_when_a_worker_has_answered(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    found = read_environment(FACTS)
    assert (found.isa, found.gpu, found.gpu_driver) == FACTS


def test_torch_facts_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert read_torch_facts() == TorchFacts(torch.backends.cpu.get_cpu_capability(), None, None)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024", "535.183.01"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65  Release Build  (root@x)", "580.65"),
    ],
)
def test_gpu_driver(files, text, version):
    assert environment._gpu_driver() is None
    files({"/proc/driver/nvidia/version": text})
    assert environment._gpu_driver() == version


def test_l3_is_summed_over_distinct_caches(files):
    assert environment._l3_bytes() is None
    cpus = "/sys/devices/system/cpu"
    for cpu, shared in [(0, "0-1"), (1, "0-1"), (2, "2-3"), (3, "2-3")]:
        files(
            {
                f"{cpus}/cpu{cpu}/cache/index2/level": "2\n",
                f"{cpus}/cpu{cpu}/cache/index2/size": "1024K\n",
                f"{cpus}/cpu{cpu}/cache/index3/level": "3\n",
                f"{cpus}/cpu{cpu}/cache/index3/size": "32768K\n",
                f"{cpus}/cpu{cpu}/cache/index3/shared_cpu_list": f"{shared}\n",
            }
        )
    assert environment._l3_bytes() == 64 * 2**20


def test_transparent_hugepage_and_governor(files, monkeypatch):
    assert environment._transparent_hugepage() is None
    files(
        {
            "/sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
            "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "performance\n",
        }
    )
    found = read_environment(FACTS)
    assert found.transparent_hugepage == "madvise"
    assert found.governor == "performance"


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.com", "-c", "commit.gpgsign=false"]
    answer = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return answer.stdout.strip()


def test_git_commit_with_plus_where_tracked_files_differ(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment.git_commit() is None  # no repository
    git(tmp_path, "init", "-q")
    assert environment.git_commit() is None  # no commit
    Path("file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-q", "-m", "one")
    git(tmp_path, "tag", "-a", "v1", "-m", "a tag is not what is asked for")
    commit = git(tmp_path, "rev-parse", "HEAD")
    Path("untracked").touch()
    assert environment.git_commit() == commit
    Path("file").write_text("two")
    assert environment.git_commit() == commit + "+"
    monkeypatch.setenv("PATH", "")
    assert environment.git_commit() is None  # no git


# Cores and memory, within the limits of control groups.


V1_GROUPS = "9:name=systemd:/\n4:memory:/outer/inner\n1:cpu:/outer\n0::/\n"
GIB = 2**30


def test_without_limits_cores_and_memory_are_the_machines(files):
    assert usable_cores() >= 1
    assert available_memory_bytes() == pytest.approx(psutil.virtual_memory().available, rel=0.2)


@pytest.mark.parametrize(
    ("cpu_max", "expected"), [("max 100000", 8), ("200000 100000", 2), ("150000 100000", 2), ("1000 100000", 1)]
)
def test_cpu_quota_v2(files, monkeypatch, cpu_max, expected):
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    files({"/proc/self/cgroup": "0::/job\n", "/sys/fs/cgroup/job/cpu.max": cpu_max})
    assert usable_cores() == expected


@pytest.mark.parametrize(("quota", "expected"), [("-1", 8), ("300000", 3)])
def test_cpu_quota_v1(files, monkeypatch, quota, expected):
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    folder = "/sys/fs/cgroup/cpu/outer"
    files(
        {
            "/proc/self/cgroup": V1_GROUPS,
            f"{folder}/cpu.cfs_quota_us": quota,
            f"{folder}/cpu.cfs_period_us": "100000",
        }
    )
    assert usable_cores() == expected


def test_memory_limit_v2_counts_reclaimable_pages_as_free(files):
    folder = "/sys/fs/cgroup/job"
    files(
        {
            "/proc/self/cgroup": "0::/job/child\n",
            f"{folder}/child/memory.max": "max",
            f"{folder}/child/memory.current": "5",
            f"{folder}/memory.max": str(GIB // 4),
            f"{folder}/memory.current": str(GIB // 8),
            f"{folder}/memory.stat": f"anon 1\ninactive_file {GIB // 16}\nactive_file 7\n",
        }
    )
    assert available_memory_bytes() == GIB // 8 + GIB // 16


def test_memory_limit_v1_of_a_group_above(files):
    folder = "/sys/fs/cgroup/memory/outer"
    files(
        {
            "/proc/self/cgroup": V1_GROUPS,
            f"{folder}/inner/memory.limit_in_bytes": "9223372036854771712",
            f"{folder}/inner/memory.usage_in_bytes": str(GIB),
            f"{folder}/memory.limit_in_bytes": str(GIB // 4),
            f"{folder}/memory.usage_in_bytes": str(GIB // 8),
            f"{folder}/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB // 16}\n",
        }
    )
    assert available_memory_bytes() == GIB // 8 + GIB // 16


def test_memory_limit_of_a_container_that_sees_only_its_own_group(files):
    files(
        {
            "/proc/self/cgroup": "0::/host/path/of/container\n",
            "/sys/fs/cgroup/memory.max": str(GIB // 4),
            "/sys/fs/cgroup/memory.current": str(GIB // 2),  # over its limit, for a moment
        }
    )
    assert available_memory_bytes() == 0


# Peak memory.


@linux_only
def test_peak_memory_counts_from_its_reset():
    if not reset_peak_memory("cpu"):
        pytest.skip("this system does not let a process reset its high-water mark")
    before = peak_memory_bytes("cpu")
    block = bytearray(256 * 2**20)
    block[::4096] = b"x" * len(block[::4096])
    with_block = peak_memory_bytes("cpu")
    del block
    assert peak_memory_bytes("cpu") == pytest.approx(with_block, abs=16 * 2**20)
    assert with_block - before == pytest.approx(256 * 2**20, abs=16 * 2**20)
    reset_peak_memory("cpu")
    assert peak_memory_bytes("cpu") < with_block - 200 * 2**20


def test_no_peak_where_the_system_does_not_tell(files):
    assert not reset_peak_memory("cpu")
    assert peak_memory_bytes("cpu") is None


@pytest.mark.cuda
def test_peak_memory_on_a_gpu():
    assert reset_peak_memory("cuda")
    before = peak_memory_bytes("cuda")
    block = torch.empty(2**20, device="cuda")
    del block
    assert peak_memory_bytes("cuda") >= before + 4 * 2**20


# Covariates of a turn.


def test_covariates_are_differences_over_the_turn(files):
    reader = CovariateReader("cpu")
    files(
        {
            "/proc/stat": "cpu  10 0 20 30 1 0 2 5 0 0\ncpu0 10 0 20 30 1 0 2 5 0 0\n",
            "/proc/pressure/cpu": "some avg10=0.07 avg60=0.32 avg300=0.12 total=1000\nfull avg10=0.00 total=0\n",
        }
    )
    reader.start()
    files(
        {
            "/proc/stat": "cpu  11 0 20 31 1 0 2 8 0 0\n",
            "/proc/pressure/cpu": "some avg10=0.07 avg60=0.32 avg300=0.12 total=1700\nfull avg10=0.00 total=0\n",
        }
    )
    found = reader.stop()
    tick_ns = 1_000_000_000 // environment.os.sysconf("SC_CLK_TCK")
    assert found.steal_ns == 3 * tick_ns
    assert found.stall_ns == 700_000
    assert found.gpu_clock_mhz is None
    assert found.gpu_throttle_reasons is None
    assert found.idle_arms_ns is None


@pytest.mark.parametrize("stat", [None, "cpu  10 0 20 30\n", ""])
def test_missing_covariates_are_none(files, stat):
    if stat is not None:
        files({"/proc/stat": stat})
    reader = CovariateReader("cpu")
    reader.start()
    found = reader.stop()
    assert found.steal_ns is None
    assert found.stall_ns is None
    assert isinstance(found, Covariates)


def test_page_faults_are_counted():
    reader = CovariateReader("cpu")
    reader.start()
    block = bytearray(64 * 2**20)
    found = reader.stop()
    assert len(block) == 64 * 2**20
    assert found.page_faults is not None
    assert found.page_faults >= 16  # by huge pages of 4 MB at the largest; 16384 by small ones


def test_covariates_cost_little():
    """Milliseconds would show between the turns; the bound is wide, for a busy machine."""
    reader = CovariateReader("cpu")
    best_ns = 10**12
    for _ in range(50):
        before = time.perf_counter_ns()
        reader.start()
        reader.stop()
        best_ns = min(best_ns, time.perf_counter_ns() - before)
    assert best_ns < 2_000_000


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
    reader = CovariateReader("cuda")
    reader.start()
    found = reader.stop()
    assert (found.gpu_clock_mhz, found.gpu_throttle_reasons) == expected
