"""`kvbench env`: the machine in human units, or as plain numbers."""

import json

import pytest

from bench.machine.cpu import Cpu
from tests import inline, small_kernels
from tests.commandline import kvbench


def test_env_shows_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MKL_NUM_THREADS", "1")
    rows = dict(line.strip("| ").split(" | ") for line in kvbench("env", "--no-ceilings").stdout.splitlines()[2:])
    rows = {name.strip(): value.strip() for name, value in rows.items()}
    assert rows["memory"].endswith(" GiB")
    assert not [name for name in rows if name.endswith("_bytes")]
    assert "MKL_NUM_THREADS=1" in rows["thread_variables"].split()
    assert json.loads(kvbench("env", "-o", "json", "--no-ceilings").stdout)["cores"] >= 1


def test_env_measures_the_ceilings_and_tells_so_beside_the_document(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of small products, in this process: a real run (test_run.py) measures the true ones in a worker."""
    inline.use(monkeypatch)
    small_kernels.use(monkeypatch)
    monkeypatch.setattr(Cpu, "last_level_cache_bytes", lambda _: 1 << 20)
    done = kvbench("env", "-o", "json")
    found = json.loads(done.stdout)["ceilings"]
    assert {(one["ceiling"], one["dtype"]) for one in found} == {
        (ceiling, dtype) for ceiling in ("read_bandwidth", "gemm") for dtype in ("float32", "bfloat16")
    }
    assert min(one["per_s"] for one in found) > 1e6  # bytes and FLOPs, not their billions
    assert "read bandwidth, cpu float32, 1 thread: " in done.stderr
