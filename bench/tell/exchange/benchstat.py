"""Go's benchmark format, which benchstat compares: a line per turn.

https://go.googlesource.com/proposal/+/master/design/14313-benchmark-format.md
"""

import re

import pandas as pd

from bench.analysis.frames import NS_PER_MS
from bench.analysis.tidy import Tidy
from bench.case import Case

_NAMED = (
    "model",
    "strategy",
    "device",
    "dtype",
    "attn_implementation",
    "batch_size",
    "n_prompt",
    "n_gen",
    "n_depth",
    "seed",
)


def documents(tidy: Tidy, summary: pd.DataFrame) -> dict[str, bytes]:
    """Write the time of a forward or step in ns/op, and tokens per second, of every turn that counts."""
    several, machine = len(tidy.run.environments) > 1, None
    cases = {
        plan.case.key: (plan.case, _name(plan.case), tidy.run.environment(plan.case)) for plan in tidy.run.manifest.plan
    }
    # No line with the run's name: by default benchstat compares only what agrees in all such lines (-table .config).
    lines = ["Unit tok/s better=higher"]
    turns = tidy.turns[["case", "phase", "latency_ms"]]
    for key, phase, latency_ms in turns.itertuples(index=False, name=None):
        case, name, measured_on = cases[key]
        if machine != measured_on:  # what stands in such a line holds from there on
            machine = measured_on
            facts = {"cpu": machine.cpu_model, "torch": machine.torch, "transformers": machine.transformers}
            facts |= {"machine": machine.hostname} if several else {}
            lines += [f"{name}: {' '.join(value.split())}" for name, value in facts.items()]
        tokens = case.batch_size * (case.n_prompt if phase == "prefill" else 1)
        figures = f"{latency_ms * NS_PER_MS:.0f} ns/op {tokens / latency_ms * 1000:.6g} tok/s"
        lines.append(f"Benchmark{phase.capitalize()}/{name} 1 {figures}")
    return {"benchstat.txt": "".join(f"{line}\n" for line in lines).encode()}


def _name(case: Case) -> str:
    """Name a case by key=value, one each level; at its end the threads, where Go has those of its scheduler.

    A slash would begin a level of its own, a space end the name.
    """
    values = (re.sub(r"[\s/]", "_", str(getattr(case, name))) for name in _NAMED)
    parts = [f"{name}={value}" for name, value in zip(_NAMED, values, strict=True)]
    parts += ["logits=all"] if case.naive_logits == "all" else []
    parts += ["prefill=quantized"] if case.prefill_quantized else []
    return f"{'/'.join(parts)}-{case.n_threads}"
