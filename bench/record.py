"""Defines what a run is made of: samples, checks, failures, environment, manifest. Frozen and versioned.

Samples are the only truth: every table, plot and verdict is derived from these records and never read back.
Times are integers in nanoseconds, sizes integers in bytes.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from bench.case import Case, DeviceName
from kvcache.arithmetic.costs import Costs, Phase
from kvcache.proof.counters import Counters

SCHEMA_VERSION = 1

Status = Literal["ok", "failed", "oom", "timeout", "unsupported", "not measured"]
FailureStatus = Literal["failed", "oom", "timeout", "unsupported"]
"""How a case ends that has no time."""
FAULTS: tuple[FailureStatus, ...] = ("failed", "oom", "timeout")
"""Those of a case that should have run, worst first: exit code 5."""
TokensMatch = Literal["true", "tie", "false"]
CeilingName = Literal["read_bandwidth", "gemm"]
VerdictKind = Literal["failed", "regression", "missing", "inconclusive", "not-comparable", "new", "faster", "same"]
"""Worst first. "failed": head's case crashed or emitted other tokens; "missing": only base has it, "new": only head."""


class Covariates(msgspec.Struct, frozen=True, kw_only=True):
    """What the machine did to a turn while it ran (differences over the turn). None: not available on this machine."""

    steal_ns: int | None = None
    """CPU time that the hypervisor took away, all cores."""
    stall_ns: int | None = None
    """Pressure-stall total of the CPU: time in which some task waited for a core."""
    involuntary_switches: int | None = None
    """Context switches that the worker did not ask for."""
    page_faults: int | None = None
    """Page faults of the worker, minor and major."""
    idle_arms_ns: int | None = None
    """CPU time of the other arms, which should sleep."""
    throttled_periods: int | None = None
    """Periods in which the CPU quota of a container stopped its threads; None without a quota."""
    throttled_ns: int | None = None
    """For how long, all threads of the container together."""
    gpu_clock_mhz: int | None = None
    gpu_throttle_reasons: int | None = None


class Sample(msgspec.Struct, frozen=True, kw_only=True, tag="sample"):
    """One turn of one case: a prefill and the decode steps after it, every time stamp kept."""

    case: str
    """`Case.key`."""
    process: int
    """Which set of worker processes, from 0."""
    round: int
    """Pairs of one round are compared; for a warm-up, its trial number."""
    order: int
    """Number of the turn in the process set, from 0: what ran when."""
    warmup: bool
    prefill_ns: int
    """From before the prefill until its token is known."""
    steps: list[int]
    """Which decode steps were timed (1 to n_gen - 1; step i emits token i + 1)."""
    step_ns: list[int]
    """Time of each of `steps`, from the token before it until its own."""
    prefill_event_ns: int | None = None
    """The same by CUDA events; None on the CPU."""
    step_event_ns: list[int] | None = None
    covariates: Covariates = Covariates()


class Quality(msgspec.Struct, frozen=True, kw_only=True):
    """What a lossy strategy loses over a text that the model wrote (fields of one name: `kvcache.proof.quality`)."""

    positions: int
    """Decode steps that were compared, per sequence."""
    top1_agreement: float
    commonest_share: float
    logit_kl: float
    logit_kl_p99: float
    logit_kl_floor: float | None
    """None where no copy of the model could be made to find it."""
    perplexity_ratio: float
    matching_tokens: int
    """First tokens of the case's own greedy run, without teacher forcing, that equal naive's."""
    recall_agreement: float | None = None
    """None where the text is too short to repeat a passage."""
    agreement_by_position: list[float] = []


class Check(msgspec.Struct, frozen=True, kw_only=True, tag="check"):
    """The correctness of one case in one process, found before any of its times were taken, and its sizes."""

    case: str
    process: int
    tokens_match: TokensMatch
    logits_error: float
    """Largest difference from the parallel pass, as a share of its largest logit."""
    positions_checked: int
    kv_bytes_after_prefill: int
    kv_bytes_after_decode: int
    peak_memory_bytes: int | None
    compile_s: float | None = None
    counters: dict[Phase, Counters] | None = None
    """By phase; None in runs that were stored before they were counted."""
    framework_step_ns: list[int] | None = None
    """Times of decode steps without arithmetic (`bench.measure.framework`); None where they cannot be measured."""
    exact: bool | None = None
    """What the strategy promises; None in runs of before there were lossy ones, which held exact ones only."""
    kv_bytes_allocated_after_prefill: int | None = None
    kv_bytes_allocated_after_decode: int | None = None
    """Every storage reachable from the cache; None in runs that were stored before they were counted."""
    quality: Quality | None = None
    """None for an exact strategy."""


class Failure(msgspec.Struct, frozen=True, kw_only=True, tag="failure"):
    """A case that could not be measured, and why."""

    case: str
    process: int
    status: FailureStatus
    error: str
    tokens_match: TokensMatch | None = None
    worker_died: bool = False
    """The worker ended by itself or was killed from outside: `--resume` tries the case again."""


class CeilingSample(msgspec.Struct, frozen=True, kw_only=True, tag="ceiling"):
    """One turn of a ceiling's kernel, beside the turns of a cell: the machine's speed at that moment."""

    cell: str
    """`Case.cell.key`: the cases of this cell are judged by it, round by round."""
    ceiling: CeilingName
    kernel: str
    """The fastest of those tried in this process (`bench.machine.ceilings`)."""
    process: int
    round: int
    order: int
    """Counted with the turns of the cases."""
    warmup: bool
    amount: int
    """Of one pass: bytes moved, or FLOPs."""
    pass_ns: list[int]
    """Time of each pass of the kernel."""
    cache_bytes: int
    """Last-level cache of the device, or what was taken for it where the system does not say."""
    covariates: Covariates = Covariates()


class CellPlan(msgspec.Struct, frozen=True, kw_only=True, tag="cell-plan"):
    """How much of one cell is measured where `--budget` decides it; a resumed run keeps to it. The last one counts."""

    cell: str
    """`Case.cell.key`."""
    repetitions: int
    tokens_per_turn: int
    """How much of a naive decode is timed (`bench.case.naive_steps`)."""
    left_out: str | None = None
    """Why its cases are not measured; None: they are."""
    spent_s: float
    """Seconds of the budget that were spent when this was decided."""


Record = Sample | Check | Failure | CeilingSample | CellPlan


class Ceiling(msgspec.Struct, frozen=True, kw_only=True):
    """How fast the machine reads or multiplies under one setting: the median pass of the fastest kernel."""

    ceiling: CeilingName
    device: DeviceName
    dtype: str
    n_threads: int
    kernel: str
    per_s: float
    """Bytes per second, or FLOP per second."""

    @property
    def name(self) -> str:
        """As the manifest names it, with its unit: `read_bandwidth_bytes_per_s cpu float32 t2`."""
        unit = "bytes_per_s" if self.ceiling == "read_bandwidth" else "flop_per_s"
        return f"{self.ceiling}_{unit} {self.device} {self.dtype} t{self.n_threads}"


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """The machine and the software of a run. Two runs are on the same machine if their `fingerprint` is equal."""

    hostname: str
    os: str
    cpu_model: str
    cores: int
    isa: str
    """The widest vector instructions that torch uses, as in `AVX512`."""
    l3_bytes: int | None
    memory_bytes: int
    python: str
    torch: str
    transformers: str
    gpu: str | None
    gpu_driver: str | None
    git_commit: str | None
    """Of the current folder's repository, with `+` where tracked files differ from it."""
    load_1min: float | None
    governor: str | None
    transparent_hugepage: str | None
    kvbench: str
    cpu_quota: float | None = None
    """Cores' worth of time that a container or job may use; None without a limit. `cores` has it rounded down."""
    memory_limit_bytes: int | None = None
    """The most memory that a container or job may hold, where that is less than `memory_bytes`."""
    bound_cores: list[int] | None = None
    """The cores that importing torch bound the main thread to ; None where it did not."""
    bound_by: str | None = None
    """The user's variables that bind threads, as in `OMP_PROC_BIND=close`."""
    thread_variables: dict[str, str] = {}
    """All of the user's variables that concern threads (`bench.machine.threads`)."""

    @property
    def fingerprint(self) -> dict[str, str | int | None]:
        """What must be equal for times to be comparable."""
        names = ("cpu_model", "cores", "isa", "python", "torch", "transformers", "gpu", "gpu_driver")
        return {name: getattr(self, name) for name in names}


class CasePlan(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A case and what arithmetic says of it, stored with the run so that a report needs no model."""

    case: Case
    prefill: Costs | None
    """None where the architecture is unknown to costs.py."""
    decode: Costs | None
    """None also where n_gen is 1."""
    weights_bytes: int | None = None
    """Of all weights in the case's dtype; None in older runs, and then omitted, so that their digest holds."""
    kv_bytes_allocated: dict[Phase, int] | None = None
    """What the kind of cache allocates by arithmetic, at the end of each phase; None for the user's own."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """`manifest.json`: what was asked for, where it ran, and the plan."""

    schema_version: int
    run_id: str
    created_utc: str
    """ISO 8601, seconds."""
    command: list[str]
    repetitions: int
    processes: int
    timeout_s: float
    budget_min: float | None = None
    """Minutes that the run may take in all; None: as long as it takes."""
    environment: Environment
    plan: list[CasePlan]
    weights: dict[str, str]
    """SHA-256 of each model's weights (or the seed and geometry that make them), by model spec."""
    ceilings: dict[str, float] = {}
    """Medians of the ceilings at the start of the run by `Ceiling.name`; empty: none were measured."""
    digest: str = ""
    """SHA-256 of this manifest with an empty digest."""


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """A stored run, read back: the manifest and every record in the order of writing."""

    path: str
    manifest: Manifest
    samples: list[Sample]
    checks: list[Check]
    failures: list[Failure]
    ceilings: list[CeilingSample] = []
    cell_plans: list[CellPlan] = []

    @property
    def name(self) -> str:
        """The run folder's name."""
        return self.path.rstrip("/").rsplit("/", 1)[-1]


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What `gate` or `ab` says of one quantity of a case and phase: `base` is compared with, `head` is judged."""

    case: str
    """`Case.key`."""
    phase: Phase
    kind: VerdictKind
    quantity: str
    """"time" (in ms), "mfu" or "mbu" (a time as a share of the roof), "tokens_match", or an exact counter's name."""
    base: float | None = None
    head: float | None = None
    effect: float | None = None
    """Change of a time as a share of base's: 0.05 is five percent slower. None for counters."""
    low: float | None = None
    high: float | None = None
    """Interval of `effect`."""
    detectable: float | None = None
    """The smallest slow-down, as a share, that this comparison could have found."""
    detail: str = ""
    """What a reader must know besides, in one line: why it is not comparable, what was left undecided."""
