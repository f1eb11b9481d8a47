"""Caches and memory of the CPU."""

import os
import sys

import numpy as np
import pytest

from bench.machine.cpu import Cpu

CPU = Cpu()
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which is Linux's")


def test_l3_is_summed_over_distinct_caches(files):
    assert CPU.last_level_cache_bytes() is None
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
    assert CPU.last_level_cache_bytes() == 64 * 2**20


@linux_only
def test_peak_memory_counts_from_its_reset():
    if not CPU.reset_peak_memory():
        pytest.skip("this system does not let a process reset its high-water mark")
    before = CPU.peak_memory_bytes()
    block = bytearray(256 * 2**20)
    block[::4096] = b"x" * len(block[::4096])
    with_block = CPU.peak_memory_bytes()
    del block
    assert CPU.peak_memory_bytes() == pytest.approx(with_block, abs=16 * 2**20)
    assert with_block - before == pytest.approx(256 * 2**20, abs=16 * 2**20)
    CPU.reset_peak_memory()
    assert CPU.peak_memory_bytes() < with_block - 200 * 2**20


def test_no_peak_where_the_system_does_not_tell(files):
    assert not CPU.reset_peak_memory()
    assert CPU.peak_memory_bytes() is None


def test_held_memory_leaves_out_the_pages_of_files(tmp_path):
    if CPU.held_memory_bytes() is None or not CPU.reset_peak_memory():
        pytest.skip("this system does not say")
    path = tmp_path / "weights"
    path.write_bytes(bytes(64 << 20))
    mapped = np.memmap(path, mode="r")
    before = CPU.held_memory_bytes()
    assert int(mapped.sum()) == 0  # reads every page
    assert CPU.held_memory_bytes() - before < 16 << 20
    CPU.reset_peak_memory()
    block = bytearray(os.urandom(1)) * (64 << 20)
    assert CPU.held_memory_bytes() - before > 48 << 20
    del block
    assert CPU.peak_held_bytes() - before > 48 << 20
    assert CPU.held_memory_bytes() - before < 16 << 20
