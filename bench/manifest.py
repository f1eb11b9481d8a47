"""Defines `manifest.json`: what was asked for, where it ran, and the plan. Frozen and versioned."""

from typing import Literal

import msgspec

from bench.case import Case, DeviceName
from kvcache.arithmetic.costs import Costs, Phase
from kvcache.arithmetic.geometry import Matrix

SCHEMA_VERSION = 1

CeilingName = Literal["read_bandwidth", "gemm"]
Product = tuple[int, int, int]
"""The shape of a matrix product: rows, features in, features out."""


class Ceiling(msgspec.Struct, frozen=True, kw_only=True):
    """How fast the machine reads or multiplies under one setting: the median pass of the fastest kernel."""

    ceiling: CeilingName
    device: DeviceName
    dtype: str
    n_threads: int
    kernel: str
    per_s: float
    """Bytes per second, or FLOP per second."""
    read_bytes: int | None = None
    """As in `bench.record.CeilingTimes`."""

    @property
    def by(self) -> str:
        """What reached it, as in `dot of 536.9 MB`."""
        return self.kernel if self.read_bytes is None else f"{self.kernel} of {self.read_bytes / 1e6:.4g} MB"

    @property
    def name(self) -> str:
        """As the manifest names it, with its unit: `read_bandwidth_bytes_per_s cpu float32 t2`."""
        unit = "bytes_per_s" if self.ceiling == "read_bandwidth" else "flop_per_s"
        return f"{self.ceiling}_{unit} {self.device} {self.dtype} t{self.n_threads}"


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """The machine and the software of a run. Two runs are on the same machine if their `fingerprint` is equal.

    What is not known has its default.
    """

    hostname: str
    os: str = ""
    cpu_model: str
    cores: int
    isa: str = ""
    """The widest vector instructions that torch uses, as in `AVX512`."""
    l3_bytes: int | None = None
    memory_bytes: int = 0
    python: str = ""
    torch: str = ""
    transformers: str = ""
    gpu: str | None = None
    gpu_driver: str | None = None
    git_commit: str | None = None
    """Of the current folder's repository, with `+` where tracked files differ from it."""
    load_1min: float | None = None
    governor: str | None = None
    transparent_hugepage: str | None = None
    kvbench: str = ""
    cpu_quota: float | None = None
    """Cores' worth of time that a container or job may use; None without a limit. `cores` has it rounded down."""
    memory_limit_bytes: int | None = None
    """The most memory that a container or job may hold, where that is less than `memory_bytes`."""
    bound_cores: list[int] | None = None
    """The cores that importing torch bound the main thread to; None where it did not."""
    bound_by: str | None = None
    """The user's variables that bind threads, as in `OMP_PROC_BIND=close`."""
    thread_variables: dict[str, str] = {}
    """All of the user's variables that concern threads (`bench.machine.affinity`)."""

    @property
    def fingerprint(self) -> dict[str, str | int | None]:
        """What must be equal for times to be comparable."""
        names = ("cpu_model", "cores", "isa", "python", "torch", "transformers", "gpu", "gpu_driver")
        return {name: getattr(self, name) for name in names}

    @property
    def machine(self) -> tuple[str | int | None, ...]:
        """Equal for two processes on the same machine with the same software: only their rounds may form pairs."""
        return self.hostname, *self.fingerprint.values()


class CasePlan(msgspec.Struct, frozen=True, kw_only=True):
    """A case and what arithmetic says of it, stored with the run so that a report needs no model."""

    case: Case
    prefill: Costs | None
    """None where nothing can be predicted."""
    decode: Costs | None
    """None also where n_gen is 1."""
    weights_bytes: int
    """Of all weights in the case's dtype."""
    kv_bytes: dict[Phase, int] | None = None
    """Those of its keys, values and states that belong to tokens, at the end of each phase; None as below."""
    kv_bytes_allocated: dict[Phase, int] | None = None
    """What the kind of cache allocates by arithmetic, at the end of each phase; None for the user's own, and in older
    runs."""
    linears: tuple[Matrix, ...] = ()
    """The shapes of the model's linear layers, each once, the smallest first, without the LM head; empty where they are
    not known, and in older runs."""
    unpredicted: str | None = None
    """Why no costs are predicted, in a line; None where they are, and in older runs."""
    setup: dict[str, str] = {}
    """Of an imported case the other tool's settings that are not its defaults; empty for our own, and in older runs."""

    @property
    def step_bytes(self) -> int:
        """Return what a decode step reads, or a prefill where there is none; the weights where nothing is predicted."""
        costs = self.decode or self.prefill
        return self.weights_bytes if costs is None else costs.bytes // costs.forward_calls


class TextFile(msgspec.Struct, frozen=True, kw_only=True):
    """The user's own text (`--text`), by which lossy strategies are judged."""

    path: str
    """As it was given."""
    digest: str
    """SHA-256 of the file."""
    tokens: dict[str, list[int]]
    """Its first tokens, as many as the run needs, by model spec."""


JOB_MINUTES = 120
"""Minutes that a job of a cluster may take unless the user says otherwise."""


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    """How the jobs of a run are started (`--cluster`); the fields after the first are Slurm's."""

    kind: Literal["slurm", "local", "files"]
    """`files`: no job is started, their files are for another scheduler."""
    partition: str | None = None
    constraint: str | None = None
    time_min: int = JOB_MINUTES
    """Minutes that a job may take."""
    parallel: int | None = None
    """The most jobs that run at a time; None: as many as there are nodes."""
    options: dict[str, str] = {}
    """Further options of sbatch by their long names, as in `{"account": "physics"}`."""

    @property
    def here(self) -> bool:
        """Return whether the jobs run on this machine, so that its cores, devices and memory count."""
        return self.kind == "local"


ELSEWHERE: Literal["measured elsewhere"] = "measured elsewhere"
"""The machine of an imported run, whose host is not known, and what a comparison with it says in place of a verdict."""


class Origin(msgspec.Struct, frozen=True):
    """Where the times of an imported run come from."""

    tool: str
    path: str
    """As it was given."""
    digest: str
    """SHA-256 of the file."""


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
    text: TextFile | None = None
    """None: the model writes the text that judges lossy strategies."""
    origin: Origin | None = None
    """None: kvbench measured the run; else it was measured elsewhere, and its tokens were not checked."""
    ceilings: dict[str, float] = {}
    """Speed of the machine at the start of the run, by `Ceiling.name`, as `kvbench env` measures it: of no cell, so
    that runs of other models compare. Empty: ceilings are not measured, beside the cells neither."""
    cluster: Cluster | None = None
    """How the groups of the plan are started, a job each; None: the command measures all of them itself."""
    kernels: dict[str, str] | None = None
    """The kernels that the run is pinned to (`--kernels`), the default for other products; None: the fastest."""
    digest: str = ""
    """SHA-256 of this manifest with an empty digest."""
