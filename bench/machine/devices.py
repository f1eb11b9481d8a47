"""The devices that can be measured. No other module of `bench` asks for a device's name, only for what it does."""

from collections.abc import Mapping

from bench.machine.cpu import Cpu
from bench.machine.cuda import Cuda

Device = Cpu | Cuda
"""All that differs between devices, member by member. Importing one imports no torch; sizes are bytes, of the worker
that asks."""

DEVICES: Mapping[str, Device] = {"cpu": Cpu(), "cuda": Cuda()}
"""By `DeviceName`."""
