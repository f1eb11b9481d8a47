"""The ceilings' kernels at sizes that take no time, on one thread of a CPU that emulates bfloat16."""

import pytest

from bench.machine import cpu, kernels


def use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make products and data small in this process."""
    monkeypatch.setattr(cpu.Cpu, "products", ((64, 128, 128), (64, 256, 256)))
    monkeypatch.setattr(kernels, "BLOCK_NUMBERS", 1 << 16)
    monkeypatch.setattr(cpu, "LEAST_DATA_BYTES", 1 << 20)
