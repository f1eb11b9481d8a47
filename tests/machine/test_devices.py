"""What devices have in common, and that importing them costs no torch."""

import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

from bench.case import HOST_DEVICES, DeviceName
from bench.machine.clock import HostClock
from bench.machine.devices import DEVICES
from tests.handmade import ENVIRONMENT

BENCH = Path(__file__).resolve().parents[2] / "bench"


def test_every_device_that_a_case_may_name_is_one():
    assert tuple(DEVICES) == get_args(DeviceName)
    assert all(name == device.name for name, device in DEVICES.items())
    assert set(DEVICES) >= HOST_DEVICES


def test_the_cpu_is_always_there():
    assert DEVICES["cpu"].why_unusable() is None
    assert DEVICES["cpu"].is_in(ENVIRONMENT)
    assert isinstance(DEVICES["cpu"].clock(), HostClock)


@pytest.mark.parametrize("available", [True, False])
def test_cuda_is_there_when_torch_finds_it(monkeypatch, available):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert DEVICES["cuda"].why_unusable() == (None if available else "torch finds no CUDA device on this machine")


def test_estimates_know_their_device():
    one, two = (DEVICES["cpu"].typical_rates(n_threads) for n_threads in (1, 2))
    assert two.flops_per_s == 2 * one.flops_per_s
    assert DEVICES["cuda"].typical_rates(1) == DEVICES["cuda"].typical_rates(2)


def test_no_other_module_asks_for_a_device_by_its_name():
    asking = re.compile(r"""([=!]=|\bin\b|startswith\() *\(?["'](cpu|cuda)\b""")
    lines = [
        f"{path.relative_to(BENCH)}: {line.strip()}"
        for path in BENCH.rglob("*.py")
        for line in path.read_text().splitlines()
        if asking.search(line)
    ]
    assert not lines


def test_what_a_flag_or_a_report_needs_of_the_machine_imports_no_torch():
    modules = ["affinity", "cgroup", "clock", "covariates", "cpu", "cuda", "devices", "environment", "kernels"]
    code = f"import sys; from bench.machine import {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=BENCH.parent)
