"""Cores and memory, within the limits of control groups."""

from __future__ import annotations

import psutil
import pytest

from bench.machine import affinity
from bench.machine.affinity import usable_cores
from bench.machine.cpu import Cpu

V1_GROUPS = "9:name=systemd:/\n4:memory:/outer/inner\n1:cpu:/outer\n0::/\n"
GIB = 2**30


def test_without_limits_cores_and_memory_are_the_machines(files):
    assert usable_cores() >= 1
    assert Cpu().available_memory_bytes() == pytest.approx(psutil.virtual_memory().available, rel=0.2)


@pytest.mark.parametrize(
    ("cpu_max", "expected"), [("max 100000", 8), ("200000 100000", 2), ("150000 100000", 2), ("1000 100000", 1)]
)
def test_cpu_quota_v2(files, monkeypatch, cpu_max, expected):
    monkeypatch.setattr(affinity.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    files({"/proc/self/cgroup": "0::/job\n", "/sys/fs/cgroup/job/cpu.max": cpu_max})
    assert usable_cores() == expected


@pytest.mark.parametrize(("quota", "expected"), [("-1", 8), ("300000", 3)])
def test_cpu_quota_v1(files, monkeypatch, quota, expected):
    monkeypatch.setattr(affinity.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
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
    assert Cpu().available_memory_bytes() == GIB // 8 + GIB // 16


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
    assert Cpu().available_memory_bytes() == GIB // 8 + GIB // 16


def test_memory_limit_of_a_container_that_sees_only_its_own_group(files):
    files(
        {
            "/proc/self/cgroup": "0::/host/path/of/container\n",
            "/sys/fs/cgroup/memory.max": str(GIB // 4),
            "/sys/fs/cgroup/memory.current": str(GIB // 2),  # over its limit, for a moment
        }
    )
    assert Cpu().available_memory_bytes() == 0
