"""What the help of `kvbench run` says of models, strategies and presets, made of the very tables that it runs by."""

from __future__ import annotations

import textwrap
from typing import Any

import msgspec

from bench.case import PRESETS, Sweep
from kvcache.models.random_weights import GEOMETRIES
from kvcache.strategies.catalogue import STRATEGIES

FLAGS: dict[str, str] = {
    "models": "-m",
    "strategies": "--strategies",
    "n_prompt": "-p",
    "n_gen": "-n",
    "n_depth": "-d",
    "batch_size": "-b",
    "dtype": "--dtype",
    "n_threads": "-t",
    "device": "--device",
    "attn_implementation": "--attn-implementation",
    "naive_logits": "--naive-logits",
    "seed": "--seed",
}
"""The flag that sets each field of a `Sweep`."""

CORRECTNESS = (
    "A strategy whose logits differ from the parallel forward beyond the dtype's tolerance fails and is not timed; "
    "if only tokens differ, within tolerance, the result is `tie`."
)
"""The rule, in the words of the README."""

LABEL = (
    "`pp128+tg31` names a case with 128 tokens of prompt and 31 decode steps (n_gen - 1: the prefill gives the first "
    "token)."
)
"""What progress and plots call a case, in the words of the README."""


def models() -> str:
    """The forms of a model's spec."""
    return (
        f"smollm2-135m; random:NAME with seeded weights ({', '.join(GEOMETRIES)}); a folder with safetensors or one "
        "GGUF file; py:module:factory; or a hub id."
    )


def strategies() -> str:
    """Every strategy and what it is."""
    return "; ".join(f"{name}: {entry.summary}" for name, entry in STRATEGIES.items())


def sweep_flags(sweep: Sweep) -> list[str]:
    """The flags that make `sweep` of the preset `default`; of that preset itself, every flag with a value."""
    default = msgspec.structs.asdict(Sweep())
    return [
        f"{FLAGS[name]} {_words(value)}"
        for name, value in msgspec.structs.asdict(sweep).items()
        if (value != default[name] or sweep == Sweep()) and value not in ((), "")
    ]


def presets() -> str:
    """A block per preset: its grids, each as the flags that differ from those of `default`."""
    blocks = ["\b\nPresets (what a preset does not name is as in default; a flag that you give replaces it):"]
    for name, sweeps in PRESETS.items():
        lines = [f"{name}:"]
        for sweep in sweeps:
            lines += textwrap.wrap(
                " ".join(sweep_flags(sweep)), 76, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
            )
        blocks.append("\n".join(["\b", *lines]))
    return "\n\n".join(blocks)


def below_the_flags() -> str:
    """What the help of `run` ends with: the rule of correctness, the names of cases, the presets."""
    return f"{CORRECTNESS}\n\n{LABEL}\n\n{presets()}"


def _words(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
