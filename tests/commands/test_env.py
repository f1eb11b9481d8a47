"""`kvbench env`: the machine in human units, or as plain numbers."""

from __future__ import annotations

import json

import pytest

from tests.commandline import kvbench


def test_env_shows_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MKL_NUM_THREADS", "1")
    rows = dict(line.strip("| ").split(" | ") for line in kvbench("env", "--no-ceilings").stdout.splitlines()[2:])
    rows = {name.strip(): value.strip() for name, value in rows.items()}
    assert rows["memory"].endswith(" GiB")
    assert not [name for name in rows if name.endswith("_bytes")]
    assert "MKL_NUM_THREADS=1" in rows["thread_variables"].split()
    assert json.loads(kvbench("env", "-o", "json", "--no-ceilings").stdout)["cores"] >= 1


def test_env_measures_the_ceilings_and_tells_so_beside_the_document() -> None:
    done = kvbench("env", "-o", "json")
    found = json.loads(done.stdout)["ceilings"]
    assert {(one["ceiling"], one["dtype"]) for one in found} == {
        (ceiling, dtype) for ceiling in ("read_bandwidth", "gemm") for dtype in ("float32", "bfloat16")
    }
    assert min(one["per_s"] for one in found) > 1e8
    assert "read bandwidth, cpu float32, 1 thread: " in done.stderr
