"""What the machine did to a turn."""

import os

import pytest

from bench.machine import cgroup, covariates
from bench.machine.covariates import CovariateReader
from bench.machine.cpu import Cpu
from bench.record import Covariates


def test_covariates_are_differences_over_the_turn(files):
    reader = CovariateReader(Cpu())
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
    tick_ns = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    assert found.steal_ns == 3 * tick_ns
    assert found.stall_ns == 700_000
    assert found.gpu_clock_mhz is None
    assert found.gpu_throttle_reasons is None
    assert found.idle_arms_ns is None
    assert found.throttled_periods is None


def test_throttled_periods_of_a_container(files):
    folder = "/sys/fs/cgroup/job"
    stat = "nr_periods 9\nnr_throttled {}\nthrottled_usec {}\n"
    files(
        {
            "/proc/self/cgroup": "0::/job\n",
            f"{folder}/cpu.max": "150000 100000",
            f"{folder}/cpu.stat": stat.format(2, 100),
        }
    )
    reader = CovariateReader(Cpu())
    reader.start()
    files({f"{folder}/cpu.stat": stat.format(5, 350)})
    found = reader.stop()
    assert (found.throttled_periods, found.throttled_ns) == (3, 250_000)


@pytest.mark.parametrize("stat", [None, "cpu  10 0 20 30\n", ""])
def test_missing_covariates_are_none(files, stat):
    if stat is not None:
        files({"/proc/stat": stat})
    reader = CovariateReader(Cpu())
    reader.start()
    found = reader.stop()
    assert found.steal_ns is None
    assert found.stall_ns is None
    assert isinstance(found, Covariates)


def test_page_faults_are_counted():
    reader = CovariateReader(Cpu())
    reader.start()
    block = bytearray(64 * 2**20)
    found = reader.stop()
    assert len(block) == 64 * 2**20
    assert found.page_faults is not None
    assert found.page_faults >= 16  # by huge pages of 4 MB at the largest; 16384 by small ones


def test_without_a_quota_a_look_reads_two_small_files(files, monkeypatch):
    """Whatever takes longer would show between the turns."""
    reader = CovariateReader(Cpu())
    read = []
    for module in (covariates, cgroup):
        monkeypatch.setattr(module, "read_file", lambda path, *_: read.append(path.name))
    reader.start()
    assert read == ["stat", "cpu"]
