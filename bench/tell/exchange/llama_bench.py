"""llama-bench's JSONL, with its field names: a `pp` row per prefill and a `tg` row per decode.

The fields are those of tools/llama-bench/README.md in llama.cpp, and what its scripts/compare-llama-bench.py requires
besides. A decode of ours begins after the prompt, so `tg31` of
a case with a prompt of 128 stands at `n_depth` 128, as llama-bench measures it with `-d 128`.
"""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import pandas as pd

from bench.analysis.tidy import Tidy, timed_phases
from bench.manifest import CasePlan
from bench.record import Run
from bench.store.llama_tests import GGML_TYPES, Test
from kvcache.strategies.catalogue import is_lossy


def documents(tidy: Tidy, summary: pd.DataFrame) -> dict[str, bytes]:
    """Write the turns that count of every case of one sequence; llama-bench knows no batch of sequences."""
    lines = [msgspec.json.encode(test) for plan in tidy.run.manifest.plan for test in _tests(tidy, plan)]
    return {"llama-bench.jsonl": b"".join(line + b"\n" for line in lines)}


def left_out(tidy: Tidy) -> int:
    """Count the cases that llama-bench has no test for: batches of several sequences."""
    return sum(plan.case.batch_size > 1 for plan in tidy.run.manifest.plan)


def _tests(tidy: Tidy, plan: CasePlan) -> Iterator[Test]:
    case, is_import = plan.case, tidy.run.manifest.origin is not None
    shapes = {"prefill": (case.n_prompt, 0, case.n_depth), "decode": (0, case.n_gen - 1, case.n_depth + case.n_prompt)}
    if is_import:  # a generation without a prompt, as it was
        shapes["decode"] = (0, case.n_gen, case.n_depth)
    for phase in timed_phases(tidy.run, case):
        n_prompt, n_gen, n_depth = shapes[phase]
        turns = tidy.by_case_and_phase.get((case.key, phase))
        if turns is not None and case.batch_size == 1:
            steps = n_gen if phase == "decode" else 1
            times_ns = [round(steps * latency_ms * 1e6) for latency_ms in turns["latency_ms"]]
            shape = {"n_prompt": n_prompt, "n_gen": n_gen, "n_depth": n_depth}
            setting = _imported(tidy.run, plan) if is_import else _setting(tidy.run, plan)
            yield msgspec.convert(setting | shape | _figures(times_ns, n_prompt + n_gen), Test, strict=False)


def _figures(times_ns: Sequence[int], tokens: int) -> dict[str, Any]:
    rates = [tokens / time_ns * 1e9 for time_ns in times_ns]
    several = len(rates) > 1
    return {
        "avg_ns": round(statistics.fmean(times_ns)),
        "stddev_ns": round(statistics.stdev(times_ns)) if several else 0,
        "avg_ts": statistics.fmean(rates),
        "stddev_ts": statistics.stdev(rates) if several else 0.0,
        "samples_ns": times_ns,
        "samples_ts": rates,
    }


def _imported(run: Run, plan: CasePlan) -> dict[str, Any]:
    """Fill the fields of an imported test as they were; those of newer builds have no place in `Test`."""
    machine = run.environment(plan.case)
    return {
        **plan.setup,
        "build_commit": plan.setup.get("build_commit", machine.git_commit or ""),
        "cpu_info": machine.cpu_model,
        "gpu_info": machine.gpu or "",
        "model_filename": plan.setup.get("model_filename", plan.case.model),
        "model_type": plan.case.model,
        "model_size": plan.weights_bytes,
        "n_threads": plan.case.n_threads,
        "flash_attn": {"flash": 1, "auto": -1}.get(plan.case.attn_implementation, 0),
        "test_time": run.manifest.created_utc,
    }


def _setting(run: Run, plan: CasePlan) -> dict[str, Any]:
    """Fill the fields that say what was measured; the strategy stands in `model_type`, as a quantisation does."""
    case, machine = plan.case, run.environment(plan.case)
    stored = GGML_TYPES.get(case.dtype, case.dtype)  # what was imported may be quantised
    kind = case.strategy if is_lossy(case.strategy) else stored
    return {
        "build_commit": machine.git_commit or "",
        "cpu_info": machine.cpu_model,
        "gpu_info": machine.gpu or "",
        "backends": case.device.upper(),
        "model_filename": case.model,
        "model_type": f"{case.model} {stored.upper()} {case.strategy}",
        "model_size": plan.weights_bytes,
        "model_n_params": 8 * plan.weights_bytes // int(stored.strip("bf")) if case.dtype in GGML_TYPES else 0,
        "n_batch": case.n_prompt,
        "n_ubatch": case.n_prompt,
        "n_threads": case.n_threads,
        "type_k": kind,
        "type_v": kind,
        "n_gpu_layers": 0 if case.on_host else 99,
        "flash_attn": "flash" in case.attn_implementation,
        "test_time": run.manifest.created_utc.replace("+00:00", "Z"),
    }
