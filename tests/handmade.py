"""Small runs made by hand, with seeded times: what the tests of frames, tables and plots read instead of real ones."""

import functools
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np

from bench.analysis.tidy import Tidy, phases
from bench.case import Case, naive_steps
from bench.judge.compare import Comparison, compare
from bench.judge.ranking import Ranking
from bench.manifest import SCHEMA_VERSION, CasePlan, Environment, Manifest
from bench.record import CeilingSample, Check, Covariates, Failure, JobStart, Quality, Run, Sample
from kvcache.arithmetic.architectures import geometry
from kvcache.arithmetic.costs import Costs, Phase, parameters, phase_costs

Model = Callable[[Case, int], float]
"""Milliseconds of a forward of a case: of step i, or of the prefill for i = 0."""

ENVIRONMENT = Environment(
    hostname="bench-1",
    os="Linux 6.8",
    cpu_model="AMD EPYC 9B45",
    cores=2,
    isa="AVX512",
    l3_bytes=33_554_432,
    memory_bytes=25_769_803_776,
    python="3.11.9",
    torch="2.13.0",
    transformers="5.23.0",
    gpu=None,
    gpu_driver=None,
    git_commit="0123abc",
    load_1min=0.2,
    governor=None,
    transparent_hugepage="madvise",
    kvbench="0.1.0",
)

QUIET = Covariates(steal_ns=0, stall_ns=0, involuntary_switches=0, page_faults=0, idle_arms_ns=0)


def make_case(strategy: str = "dynamic", n_prompt: int = 128, **fields: Any) -> Case:
    """A case of SmolLM2 on two threads; `fields` replace the defaults."""
    defaults: dict[str, Any] = {
        "model": "smollm2-135m",
        "device": "cpu",
        "dtype": "float32",
        "attn_implementation": "sdpa",
        "n_threads": 2,
        "batch_size": 1,
        "n_gen": 32,
        "n_depth": 0,
        "seed": 0,
    }
    return Case(strategy=strategy, n_prompt=n_prompt, **(defaults | fields))


def grid(strategies: Iterable[str], n_prompts: Sequence[int], **fields: Any) -> list[Case]:
    """Every strategy at every prompt length, cell by cell."""
    strategies = list(strategies)
    return [make_case(strategy, n_prompt, **fields) for n_prompt in n_prompts for strategy in strategies]


def smollm2_ms(case: Case, step: int) -> float:
    """Times like those of SmolLM2-135M on two cores: naive grows with the sequence, a cached step hardly."""
    length = case.n_depth + case.n_prompt + step
    if step == 0 or case.strategy == "naive":
        return 60.0 + 1.6 * length + 1e-4 * length**2
    per_step = {"dynamic": (40.0, 0.007), "static": (42.0, 0.023), "hf-generate": (41.5, 0.0072)}
    base, per_token = per_step.get(case.strategy, (30.0, 0.005))
    return base + per_token * length


SMOLLM2 = geometry(
    SimpleNamespace(
        model_type="llama",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        _attn_implementation="sdpa",
    )
)
Roofs = Callable[[Case, int], dict[str, float]]
"""Bytes and FLOP per second of each ceiling, beside a cell in a round."""


def steady_roofs(case: Case, number: int) -> dict[str, float]:
    """40 GB/s and 400 GFLOP/s: as many threads as there are scale the second only."""
    return {"read_bandwidth": 40e9, "gemm": 200e9 * case.n_threads}


def on_nodes(run: Run, name_of: Callable[[Case], str]) -> Run:
    """The same run, each cell measured on the node that `name_of` names for it, as a cluster run has them."""
    starts = {
        plan.case.cell.key: JobStart(
            run_id=run.manifest.run_id,
            job="job-0",
            attempt="a",
            environment=msgspec.structs.replace(run.manifest.environment, hostname=name_of(plan.case.cell)),
        )
        for plan in run.manifest.plan
    }
    return msgspec.structs.replace(run, starts=starts)


@functools.cache
def smollm2_plan(case: Case) -> CasePlan:
    """The true costs of SmolLM2-135M in float32; to add them up takes longer than the rest of a run made by hand."""
    shape = {name: getattr(case, name) for name in ("batch_size", "n_prompt", "n_gen", "n_depth")}
    prefill, decode = (
        phase_costs(SMOLLM2, phase, refeeds=case.strategy == "naive", dtype_bytes=4, **shape)
        for phase in ("prefill", "decode")
    )
    return CasePlan(case=case, prefill=prefill, decode=decode, weights_bytes=4 * parameters(SMOLLM2))


def floors_ms(case: Case, step: int, roofs: Roofs = steady_roofs) -> tuple[float, float]:
    """The floors of a forward of SmolLM2-135M: of step i, or of the prefill for i = 0; compute and memory."""
    plan, rates = smollm2_plan(case), roofs(case, 0)
    costs = plan.prefill if step == 0 else plan.decode
    assert costs is not None
    flops, moved = costs.flops / costs.forward_calls, costs.bytes / costs.forward_calls
    return flops / rates["gemm"] * 1000, moved / rates["read_bandwidth"] * 1000


def make_run(
    cases: Sequence[Case],
    *,
    ms: Model = smollm2_ms,
    rounds: int = 6,
    repetitions: int | None = None,
    processes: int = 1,
    warmups: int = 1,
    turn_noise: float = 0.01,
    step_noise: float = 0.01,
    seed: int = 0,
    failures: Sequence[Failure] = (),
    tokens_match: dict[str, str] | None = None,
    covariates: Callable[[Case, int], Covariates] | None = None,
    environment: Environment = ENVIRONMENT,
    path: str = "results/runs/handmade",
    event_share: float | None = None,
    plan: Callable[[Case], CasePlan] | None = None,
    roofs: Roofs | None = None,
) -> Run:
    """A run of `cases`; a case named in `failures` has no samples in that process. The same arguments, the same run.

    `repetitions` were asked for, by default as many as there are `rounds`: further ones replaced disturbed rounds.
    `event_share` stores CUDA event times that are this share of the host's. `plan` makes the costs (`make_plan`),
    `roofs` gives the run ceilings, each with three passes a turn.
    """
    random = np.random.default_rng(seed)
    lost = {(failure.case, failure.process) for failure in failures}
    samples: list[Sample] = []
    for process in range(processes):
        turns = [(number, True) for number in range(warmups)] + [(number, False) for number in range(rounds)]
        for number, warmup in turns:
            for case in cases:
                noise = np.exp(random.normal(0, turn_noise)) * np.exp(random.normal(0, step_noise, case.n_gen))
                if (case.key, process) in lost:
                    continue
                steps = naive_steps(case) if case.strategy == "naive" else list(range(1, case.n_gen))
                times = [round(ms(case, step) * noise[step] * 1e6) for step in (0, *steps)]
                events = None if event_share is None else [round(time * event_share) for time in times]
                samples.append(
                    Sample(
                        case=case.key,
                        process=process,
                        round=number,
                        order=len(samples),
                        warmup=warmup,
                        prefill_ns=times[0],
                        steps=steps,
                        step_ns=times[1:],
                        prefill_event_ns=None if events is None else events[0],
                        step_event_ns=None if events is None else events[1:],
                        covariates=QUIET if covariates is None else covariates(case, number),
                    )
                )
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        run_id="handmade",
        created_utc="2026-11-23T04:00:00Z",
        command=["kvbench", "run"],
        repetitions=rounds if repetitions is None else repetitions,
        processes=processes,
        timeout_s=900.0,
        environment=environment,
        plan=[(plan or make_plan)(case) for case in cases],
        weights={case.model: "5f" * 32 for case in cases},
    )
    checks = [
        make_check(case, process, (tokens_match or {}).get(case.key, "true"))
        for process in range(processes)
        for case in cases
        if (case.key, process) not in lost
    ]
    ceilings = [
        make_ceiling(cell, name, per_s, process=process, number=number, warmup=warmup)
        for process in range(processes)
        for number, warmup in [(0, True), *((number, False) for number in range(rounds))]
        for cell in (dict.fromkeys(case.cell for case in cases) if roofs is not None else ())
        for name, per_s in (roofs or steady_roofs)(cell, number).items()
    ]
    return Run(path=path, manifest=manifest, samples=samples, checks=checks, failures=list(failures), ceilings=ceilings)


def compared(a: Run, b: Run) -> Comparison:
    return compare(Tidy.of(a), Tidy.of(b))


def ranked(runs: Iterable[Run]) -> Ranking:
    return Ranking.of([Tidy.of(run) for run in runs])


def make_ceiling(
    cell: Case, name: str, per_s: float, *, process: int = 0, number: int = 0, warmup: bool = False, **fields: Any
) -> CeilingSample:
    """A turn of a ceiling: three passes, the slowest twice as slow, the median at `per_s`."""
    pass_ns = 5_000_000
    defaults = {
        "type": "ceiling",
        "cell": cell.key,
        "ceiling": name,
        "kernel": "dot" if name == "read_bandwidth" else "onednn 512x1024x1024",
        "process": process,
        "round": number,
        "order": number,
        "warmup": warmup,
        "amount": round(per_s * pass_ns / 1e9),
        "pass_ns": [2 * pass_ns, pass_ns, pass_ns - 1000],
        "cache_bytes": 33_554_432,
        "read_bytes": 1_000_000_000 if name == "read_bandwidth" else None,
        "covariates": msgspec.to_builtins(QUIET),
    }
    return msgspec.convert(defaults | fields, CeilingSample)


def make_plan(case: Case) -> CasePlan:
    """The plan of a case with simple costs: 2 FLOPs a token, 8 bytes of keys and values each."""
    tokens = case.n_depth + case.n_prompt

    def costs(calls: int, processed: int, held: int) -> Costs:
        return Costs(
            forward_calls=calls,
            tokens_processed=case.batch_size * processed,
            gemm_flops=2 * processed,
            gemv_flops=calls,
            bytes=100 * calls,
            kv_bytes=0 if case.strategy == "naive" else 8 * held,
        )

    n_steps = case.n_gen - 1
    lengths = range(tokens + 1, tokens + case.n_gen)
    decode = costs(n_steps, sum(lengths) if case.strategy == "naive" else n_steps, tokens + n_steps)
    prefill = costs(1, case.n_prompt, tokens)
    return CasePlan(case=case, prefill=prefill, decode=decode if n_steps else None, weights_bytes=0)


def make_check(case: Case, process: int = 0, tokens_match: str = "true") -> Check:
    """The check of a case; sizes grow with the process, so that the largest can be told."""
    held = 0 if case.strategy == "naive" else case.n_depth + case.n_prompt
    return msgspec.convert(
        {
            "type": "check",
            "case": case.key,
            "process": process,
            "tokens_match": tokens_match,
            "logits_error": 1e-6,
            "positions_checked": case.n_gen,
            "kv_bytes_after_prefill": 8 * held,
            "kv_bytes_after_decode": 8 * (held + case.n_gen - 1) if held else 0,
            "peak_memory_bytes": 600_000_000 + process,
            "compile_s": 12.5 + process if case.strategy == "compiled" else None,
            "framework_step_ns": [900_000, 800_000, 1_000_000 + process] if case.strategy == "dynamic" else None,
            "counters": {phase: make_counters(case, phase) for phase in phases(case)},
        },
        Check,
    )


def make_counters(case: Case, phase: Phase, **fields: int) -> dict[str, int]:
    """What was counted in a phase, in line with `make_plan`; `fields` replace counts."""
    plan = make_plan(case)
    costs = plan.prefill if phase == "prefill" else plan.decode
    assert costs is not None
    counts = {
        "steps": 0 if phase == "prefill" else case.n_gen - 1,
        "forward_calls": costs.forward_calls,
        "tokens_processed": costs.tokens_processed,
        "gemm_flops": costs.gemm_flops,
        "gemv_flops": costs.gemv_flops,
        "kv_bytes": costs.kv_bytes,
        "cache_growth_bytes": costs.kv_bytes if case.strategy == "dynamic" and phase == "decode" else 0,
        "copied_bytes": 10 * costs.tokens_processed,
        "lm_head_positions": case.batch_size * costs.forward_calls,
    }
    return counts | fields


def fail(case: Case, status: str = "oom", error: str = "not enough memory", process: int = 0) -> Failure:
    """The failure of a case in one process."""
    return msgspec.convert(
        {"type": "failure", "case": case.key, "process": process, "status": status, "error": error}, Failure
    )


LOST = Quality(
    positions=2,
    top1_agreement=0.5,
    commonest_share=0.1,
    logit_kl=0.02,
    logit_kl_p99=0.2,
    logit_kl_floor=1e-3,
    perplexity_ratio=1.25,
    matching_tokens=3,
    recall_agreement=0.75,
    agreement_by_position=(1.0, 0.0),
)


def run_with_lossy_kinds(strategies: Sequence[str] = ("dynamic", "fp8", "cache:mine:make")) -> Run:
    """`fp8` takes a quarter of dynamic's bytes, and so does the user's own."""
    run = make_run(grid(strategies, [100, 300]))
    lossy = {plan.case.key for plan in run.manifest.plan if plan.case.strategy not in ("naive", "dynamic")}
    checks = []
    for check in run.checks:
        share = 4 if check.case in lossy else 1
        checks.append(
            msgspec.structs.replace(
                check,
                exact=share == 1,
                quality=LOST if share == 4 else None,
                kv_bytes_allocated_after_prefill=100 * check.kv_bytes_after_prefill // share,
                kv_bytes_allocated_after_decode=100 * check.kv_bytes_after_decode // share,
            )
        )
    plan = [
        msgspec.structs.replace(item, kv_bytes_allocated={"prefill": 7, "decode": 8})
        if item.case.strategy == "fp8"
        else item
        for item in run.manifest.plan
    ]
    return msgspec.structs.replace(run, checks=checks, manifest=msgspec.structs.replace(run.manifest, plan=plan))
