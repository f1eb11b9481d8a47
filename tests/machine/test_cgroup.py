"""Cores and memory, within the limits of control groups."""

import math
import os
import subprocess
import sys

import psutil
import pytest

from bench.machine import affinity, cgroup
from bench.machine.affinity import usable_cores
from bench.machine.cpu import Cpu

V1_GROUPS = "9:name=systemd:/\n4:memory:/outer/inner\n1:cpu:/outer\n0::/\n"
GIB = 2**30


def test_without_limits_cores_and_memory_are_the_machines(files):
    assert usable_cores() >= 1
    assert Cpu().available_memory_bytes() == pytest.approx(psutil.virtual_memory().available, rel=0.2)


@pytest.mark.parametrize(
    ("cpu_max", "expected"),
    [("max 100000", 8), ("200000 100000", 2), ("150000 100000", 1), ("765000 100000", 7), ("1000 100000", 1)],
)
def test_cpu_quota_v2(files, monkeypatch, cpu_max, expected):
    monkeypatch.setattr(affinity, "_AT_START", frozenset(range(8)))
    files({"/proc/self/cgroup": "0::/job\n", "/sys/fs/cgroup/job/cpu.max": cpu_max})
    assert usable_cores() == expected


@pytest.mark.parametrize(("quota", "expected"), [("-1", 8), ("300000", 3), ("150000", 1), ("50000", 1)])
def test_cpu_quota_v1(files, monkeypatch, quota, expected):
    monkeypatch.setattr(affinity, "_AT_START", frozenset(range(8)))
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


@pytest.mark.parametrize(("outer", "inner"), [("max 100000", "250000 100000"), ("250000 100000", "400000 100000")])
def test_the_least_quota_of_nested_groups_holds(files, outer, inner):
    folder = "/sys/fs/cgroup/job"
    files({"/proc/self/cgroup": "0::/job/child\n", f"{folder}/cpu.max": outer, f"{folder}/child/cpu.max": inner})
    assert cgroup.cpu_quota() == 2.5


@pytest.mark.parametrize(
    ("mount", "group"),
    [
        # The controllers of v1 mounted together, and named in another order.
        ("/ /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct", "3:cpuacct,cpu:/outer/inner"),
        # A container that sees its own group as the root of the mount, and runs in a group below it.
        (
            "/box/1 /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct",
            "3:cpu,cpuacct:/box/1/outer/inner",
        ),
        # The tree of v2 in an unusual place.
        ("/ /sys/fs/cgroup/cpu,cpuacct rw - cgroup2 cgroup rw", "0::/outer/inner"),
    ],
)
def test_groups_are_found_where_they_are_mounted(files, mount, group):
    files(
        {
            "/proc/self/mountinfo": f"36 35 0:3 {mount}\n",
            "/proc/self/cgroup": f"7:memory:/other\n{group}\n",
            "/sys/fs/cgroup/cpu,cpuacct/outer/inner/cpu.cfs_quota_us": "250000",
            "/sys/fs/cgroup/cpu,cpuacct/outer/inner/cpu.cfs_period_us": "100000",
        }
    )
    assert cgroup.cpu_quota() == 2.5


def test_a_mount_whose_name_has_a_space(files):
    files(
        {
            "/proc/self/mountinfo": "36 35 0:3 / /mnt/my\\040groups rw - cgroup2 cgroup rw\n",
            "/proc/self/cgroup": "0::/job\n",
            "/mnt/my groups/job/cpu.max": "250000 100000",
        }
    )
    assert cgroup.cpu_quota() == 2.5


@pytest.mark.parametrize("group", ["/../sibling", "/elsewhere"])
def test_of_a_group_that_cannot_be_seen_the_root_counts(files, group):
    files(
        {
            "/proc/self/mountinfo": "36 35 0:3 /kubepods/pod1 /sys/fs/cgroup rw - cgroup2 cgroup rw\n",
            "/proc/self/cgroup": f"0::{group}\n",
            "/sys/fs/cgroup/cpu.max": "250000 100000",
            "/sys/fs/sibling/cpu.max": "100000 100000",
        }
    )
    assert cgroup.cpu_quota() == 2.5


def test_without_groups_nothing_is_limited(files):
    files({"/proc/self/mountinfo": "", "/proc/self/cgroup": "0::/\n"})
    assert cgroup.cpu_quota() == cgroup.memory_limit_bytes() == cgroup.free_memory_bytes() == math.inf
    assert cgroup.groups_with_quota() == []
    assert cgroup.throttling([]) is None


def test_the_least_memory_limit_of_nested_groups_holds(files):
    folder = "/sys/fs/cgroup/job"
    files(
        {
            "/proc/self/cgroup": "0::/job/child\n",
            f"{folder}/memory.max": str(2 * GIB),
            f"{folder}/child/memory.max": str(4 * GIB),
        }
    )
    assert cgroup.memory_limit_bytes() == 2 * GIB


def test_throttling_is_summed_over_the_groups_that_have_a_quota(files):
    folder = "/sys/fs/cgroup/job"
    files(
        {
            "/proc/self/cgroup": "0::/job/child\n",
            f"{folder}/cpu.max": "100000 100000",
            f"{folder}/cpu.stat": "usage_usec 9\nnr_periods 9\nnr_throttled 2\nthrottled_usec 70\n",
            f"{folder}/child/cpu.max": "50000 100000",
            f"{folder}/child/cpu.stat": "usage_usec 9\nnr_periods 9\nnr_throttled 3\nthrottled_usec 5\n",
            "/sys/fs/cgroup/cpu.stat": "usage_usec 9\n",
        }
    )
    assert cgroup.throttling(cgroup.groups_with_quota()) == (5, 75_000)


def test_throttling_of_v1_is_in_nanoseconds(files):
    folder = "/sys/fs/cgroup/cpu/outer"
    files(
        {
            "/proc/self/cgroup": V1_GROUPS,
            f"{folder}/cpu.cfs_quota_us": "150000",
            f"{folder}/cpu.cfs_period_us": "100000",
            f"{folder}/cpu.stat": "nr_periods 9\nnr_throttled 4\nthrottled_time 123\n",
        }
    )
    assert cgroup.throttling(cgroup.groups_with_quota()) == (4, 123)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinities")
def test_a_set_of_cores_counts_as_a_cpuset_does():
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
    code += "from bench.machine.affinity import allowed_cores, usable_cores; print(allowed_cores(), usable_cores())"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "1 1\n"
