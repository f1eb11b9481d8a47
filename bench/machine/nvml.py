"""NVIDIA's management library: what the GPU's clock does. It comes in a package of its own, nvidia-ml-py."""

from __future__ import annotations

from typing import Any


class NvmlGpu:
    """The clock of one GPU, and why it is slower than it could be; None is answered where the library cannot tell."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    @classmethod
    def current(cls) -> NvmlGpu | None:
        """The GPU that torch uses, found by its UUID (CUDA_VISIBLE_DEVICES renumbers); None without the package."""
        try:
            import pynvml
        except ImportError:
            return None
        import torch

        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        try:
            pynvml.nvmlInit()
            return cls(pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
        except pynvml.NVMLError:
            return None

    def clock_mhz(self) -> int | None:
        """Clock of the multiprocessors now."""
        return self._ask("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_SM)

    def throttle_reasons(self) -> int | None:
        """Bits of NVML's clocks event reasons now."""
        return self._ask("nvmlDeviceGetCurrentClocksThrottleReasons")

    def _ask(self, question: str, *details: int) -> int | None:
        try:
            return int(getattr(self._nvml, question)(self._handle, *details))
        except self._nvml.NVMLError:  # not supported on this card, or in this container
            return None
