"""An environment and the ceilings measured on it, as tables or JSON."""

import json
from collections.abc import Sequence
from typing import Any

import msgspec

from bench.case import HOST_DEVICES
from bench.manifest import Ceiling, Environment
from bench.tell.formats import DocumentFormat
from bench.tell.layout import markdown_table
from bench.tell.words import NOTHING, number


def render(environment: Environment, form: DocumentFormat, ceilings: Sequence[Ceiling] = ()) -> str:
    """Write the fields of an environment and the ceilings measured on it, as tables or as one JSON object."""
    if form == "json":
        fields = msgspec.structs.asdict(environment)
        found = [msgspec.structs.asdict(ceiling) for ceiling in ceilings]
        return json.dumps(fields | ({"ceilings": found} if found else {}), indent=2) + "\n"
    text = f"{markdown_table(facts(environment), ['field', 'value'])}\n"
    return f"{text}\n{_ceilings(ceilings)}" if ceilings else text


def facts(environment: Environment) -> list[list[str]]:
    """Write each field of an environment and its value for a reader."""
    return [_environment_line(name, value) for name, value in msgspec.structs.asdict(environment).items()]


def _environment_line(name: str, value: Any) -> list[str]:
    """Write a field for a reader: bytes in binary units, the load in two digits, variables as in a shell."""
    label = name.removesuffix("_bytes")
    if value is None or value in ({}, [], ()):
        return [label, NOTHING]
    if label != name:
        unit, size = ("GiB", 2**30) if value >= 2**30 else ("MiB", 2**20)
        return [label, f"{number(value / size)} {unit}"]
    if isinstance(value, dict):
        return [label, " ".join(f"{variable}={setting}" for variable, setting in value.items())]
    return [label, f"{value:.2f}" if isinstance(value, float) else str(value)]


def _ceilings(ceilings: Sequence[Ceiling]) -> str:
    """Write a line per setting: its read bandwidth and its GEMM rate, each with the kernel that reached it."""
    settings: dict[tuple[str, str, int], dict[str, Ceiling]] = {}
    for ceiling in ceilings:
        settings.setdefault((ceiling.device, ceiling.dtype, ceiling.n_threads), {})[ceiling.ceiling] = ceiling
    lines = [
        [
            device,
            dtype,
            str(n_threads) if device in HOST_DEVICES else NOTHING,
            *_rate(found.get("read_bandwidth"), 1e9),
            *_rate(found.get("gemm"), 1e12),
        ]
        for (device, dtype, n_threads), found in settings.items()
    ]
    headers = ["device", "dtype", "threads", "read GB/s", "by", "GEMM TFLOP/s", "by"]
    align = ["left", "left", "right", "right", "left", "right", "left"]
    return f"{markdown_table(lines, headers, align)}\n"


def _rate(ceiling: Ceiling | None, unit: float) -> list[str]:
    return [NOTHING, NOTHING] if ceiling is None else [number(ceiling.per_s / unit), ceiling.by]
