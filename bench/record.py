"""Defines the records of a run: samples, checks, failures, the ceilings' turns. Frozen and versioned.

Samples are the only truth: every table, plot and verdict is derived from these records and never read back.
Times are integers in nanoseconds, sizes integers in bytes.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from bench.case import Case
from bench.manifest import ELSEWHERE, CeilingName, Environment, Manifest
from kvcache.arithmetic.costs import Phase
from kvcache.proof.counters import Counters

Status = Literal["ok", "failed", "oom", "timeout", "unsupported", "not measured"]
FailureStatus = Literal["failed", "oom", "timeout", "unsupported"]
"""How a case ends that has no time."""
FAULTS: tuple[FailureStatus, ...] = ("failed", "oom", "timeout")
"""Those of a case that should have run, worst first: exit code 5."""
TokensMatch = Literal["true", "tie", "false"]


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
    """CPU time of the other strategies' workers, which should sleep."""
    throttled_periods: int | None = None
    """Periods in which the CPU quota of a container stopped its threads; None without a quota."""
    throttled_ns: int | None = None
    """For how long, all threads of the container together."""
    gpu_clock_mhz: int | None = None
    gpu_throttle_reasons: int | None = None


class TurnTimes(msgspec.Struct, frozen=True, kw_only=True):
    """The times of one turn: a prefill and the decode steps after it, every time stamp kept."""

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

    @property
    def total_ns(self) -> int:
        """What the turn took: its prefill and its timed decode steps."""
        return self.prefill_ns + sum(self.step_ns)

    @property
    def device_ns(self) -> tuple[int, list[int]]:
        """`prefill_ns` and `step_ns`, by CUDA events where they were taken."""
        if self.prefill_event_ns is None or self.step_event_ns is None:
            return self.prefill_ns, self.step_ns
        return self.prefill_event_ns, self.step_event_ns


class Sample(TurnTimes, frozen=True, kw_only=True, tag="sample"):
    """One turn of one case."""

    case: str
    """`Case.key`."""
    process: int
    """Which set of worker processes, from 0."""
    round: int
    """Pairs of one round are compared; for a warm-up, its trial number."""
    order: int
    """Number of the turn in the process set, from 0: what ran when."""
    warmup: bool


class Quality(msgspec.Struct, frozen=True, kw_only=True):
    """What a lossy strategy loses over a text (fields of one name: `kvcache.proof.quality`)."""

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
    agreement_by_position: tuple[float, ...] = ()
    writer: str = ""
    """The strategy that wrote the text; `FILE` for the user's own, empty in older runs."""


FILE = "--text"
"""The writer of a text that the user gave."""


MAX_GROWTH, GROWTH_NOISE_BYTES = 1.1, 1 << 20
"""A process that holds more than this many times its cache, and this much more, keeps what the walk over its storages
does not find. Once libraries have their buffers, that of unchanged code held at most 0.5 MB more, on 30 layers."""


def outgrows(growth_bytes: int, found_bytes: int, noise_bytes: int = GROWTH_NOISE_BYTES) -> bool:
    """Return whether a process grew by more than what can be reached from its cache explains."""
    return growth_bytes > max(MAX_GROWTH * found_bytes, found_bytes + noise_bytes)


class CheckFindings(msgspec.Struct, frozen=True, kw_only=True):
    """How a case's tokens and logits compare with the reference, before any of its times are taken, and its sizes."""

    tokens_match: TokensMatch
    logits_error: float
    """Largest difference from the parallel pass, as a share of its largest logit."""
    positions_checked: int
    kv_bytes_after_prefill: int
    kv_bytes_after_decode: int
    peak_memory_bytes: int | None
    peak_beyond_weights_bytes: int | None = None
    """The most that the process held at once beyond what it held with its weights alone, in a pass of its own; None
    where the system does not say, and in older runs."""
    growth_bytes: int | None = None
    """What it holds more after that pass than before, while the cache is full: the cache, seen from outside."""
    compile_s: float | None = None
    exact: bool | None = None
    """What the strategy promises; None in runs of before there were lossy ones, which held exact ones only."""
    kv_bytes_allocated_after_prefill: int | None = None
    kv_bytes_allocated_after_decode: int | None = None
    """Every storage reachable from the cache; None in runs that were stored before they were counted."""
    quality: Quality | None = None
    """None for an exact strategy."""
    kernels: dict[str, str] | None = None
    """Which kernel computed each product; None for a strategy without a choice, and in older runs."""
    replays: bool | None = None
    """Whether decode steps ran what an earlier one recorded; None for a strategy that records none, and in older
    runs."""
    reference_rounding: float = 0.0
    """How far rounding alone moves the parallel forward's logits from naive's, as a share of the largest; 0 where they
    were not compared."""
    reference_by_naive: bool = False
    """The reference's logits are naive's own, step by step, not the parallel forward's; False in runs of before it was
    stored, where `depends_on_later` says so."""
    depends_on_later: bool = False
    """A position's logits depend on the tokens after it in this model: the reference is naive, step by step."""


class Check(CheckFindings, frozen=True, kw_only=True, tag="check"):
    """The correctness of one case in one process, and its sizes."""

    case: str
    process: int
    counters: dict[Phase, Counters]
    framework_step_ns: list[int] | None = None
    """Times of decode steps without arithmetic (`bench.measure.framework`); None where they cannot be measured."""


def kernels_of(checks: Iterable[Check]) -> dict[str, str]:
    """Return which kernel computed each product, those of several processes with commas; empty without a choice."""
    named: dict[str, dict[str, None]] = {}
    for check in checks:
        for product, kernel in (check.kernels or {}).items():
            named.setdefault(product, {})[kernel] = None
    return {product: ", ".join(kernels) for product, kernels in named.items()}


class Failure(msgspec.Struct, frozen=True, kw_only=True, tag="failure"):
    """A case that could not be measured, and why."""

    case: str
    process: int
    status: FailureStatus
    error: str
    tokens_match: TokensMatch | None = None
    worker_died: bool = False
    """The worker ended by itself or was killed from outside: `--resume` tries the case again."""


class CeilingTimes(msgspec.Struct, frozen=True, kw_only=True):
    """The times of one turn of a ceiling's kernel."""

    kernel: str
    """The fastest of those tried in this process (`bench.machine.ceilings`)."""
    amount: int
    """Of one pass: bytes moved, or FLOPs."""
    pass_ns: list[int]
    """Time of each pass of the kernel."""
    cache_bytes: int
    """Last-level cache of the device, or what was taken for it where the system does not say."""
    read_bytes: int | None = None
    """Size of what a read goes through again in every pass; None for products, and in runs of before it was chosen for
    the cell (512 MiB then, or three last-level caches)."""
    covariates: Covariates = Covariates()


LEAST_READ_BYTES = 4 << 20
"""The smallest read of a ceiling: a pass over less is mostly the call of its kernel."""
MOST_READ_BYTES, MOST_READ_CACHES = 2 << 30, 4
"""A read of more bytes than the larger of the two is as fast as that of so many: no cache keeps any of it."""


class CeilingSample(CeilingTimes, frozen=True, kw_only=True, tag="ceiling"):
    """One turn of a ceiling's kernel, beside the turns of a cell: the machine's speed at that moment."""

    cell: str
    """`Case.cell.key`: the cases of this cell are judged by it, round by round."""
    ceiling: CeilingName
    process: int
    round: int
    order: int
    """Counted with the turns of the cases."""
    warmup: bool


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


class Text(msgspec.Struct, frozen=True, kw_only=True, tag="text"):
    """The text that judges the lossy cases of a group, written once; a shorter cell uses its beginning."""

    case: str
    """`Case.key` of the case for which it was written: it is for all cases of its group, batch size and seed."""
    writer: str
    """The strategy that wrote it."""
    n_context: int | None = None
    """The longest context that it can judge after; None in older runs: any of its group."""
    tokens: list[list[int]]
    """`[batch, n]`"""


class JobStart(msgspec.Struct, frozen=True, kw_only=True, tag="job-start"):
    """The first record of a job's samples file: which job of which run, and the machine that measures it."""

    run_id: str
    job: str
    attempt: str
    """A random name of this file: a job that is started again writes another."""
    continues: list[str] = []
    """Earlier attempts of the job on the same machine, whose rounds this one adds to."""
    environment: Environment
    """Its `hostname` is the scheduler's name of the node, where there is one."""
    ceilings: dict[str, float] = {}
    """As `Manifest.ceilings`, of this machine."""


Record = Sample | Check | Failure | CeilingSample | CellPlan | Text | JobStart


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """A stored run, read back: the manifest and every record in the order of writing."""

    path: str
    manifest: Manifest
    samples: Sequence[Sample]
    """A list, or in columns (`bench.turns.Turns`) as read from a file; so are the ceilings'."""
    checks: list[Check]
    failures: list[Failure]
    ceilings: Sequence[CeilingSample] = ()
    cell_plans: list[CellPlan] = []
    texts: list[Text] = []
    starts: dict[str, JobStart] = {}
    """Which attempt of which job measured each cell (`Case.cell.key`); empty where one process measured all of them."""

    def environment(self, case: Case) -> Environment:
        """Return the machine and software that measured `case`, or would have."""
        start = self.starts.get(case.cell.key)
        return self.manifest.environment if start is None else start.environment

    @property
    def environments(self) -> list[Environment]:
        """The machines that measured the run, each once and by name; of a run without jobs the command's own."""
        machines = {start.environment.machine: start.environment for start in self.starts.values()}
        return sorted(machines.values(), key=lambda each: each.hostname) or [self.manifest.environment]

    def distinct(self, field: str) -> list[str]:
        """Return the values that the machines which measured the run have in a field, without empty ones."""
        values = dict.fromkeys(getattr(each, field) for each in self.environments)
        return [str(value) for value in values if value not in (None, "")]

    @property
    def machine_names(self) -> str:
        """The names of the machines that measured the run, separated by commas."""
        return ", ".join(dict.fromkeys(each.hostname for each in self.environments))

    @property
    def name(self) -> str:
        """The run folder's name."""
        return self.path.rstrip("/").rsplit("/", 1)[-1]

    @property
    def label(self) -> str:
        """The same, marked where another tool measured the run."""
        return self.name if self.manifest.origin is None else f"{self.name}, {ELSEWHERE}"
