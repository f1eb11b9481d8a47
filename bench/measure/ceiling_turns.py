"""The ceilings' turns: beside a cell's, in a worker of their own whose failure costs no case, or once per setting."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, get_args

from bench.case import DeviceName, Group
from bench.machine.devices import DEVICES
from bench.measure.worker_process import WorkerFailed, WorkerProcess
from bench.protocol import CeilingsChosen, CeilingTurnTaken, ChooseCeilings, Reply, Request, TakeCeilingTurn
from bench.record import CasePlan, Ceiling, CeilingName, CeilingSample, Environment

CEILINGS: tuple[CeilingName, ...] = get_args(CeilingName)
TIMEOUT_S = 120.0
"""Of a request that takes a second at most on a machine at rest."""
ROUND_S = 0.15
"""What a turn of each ceiling takes together, roughly."""

Setting = tuple[DeviceName, str, int]
"""Device, dtype, threads."""


class Asked(Protocol):
    """The driver's end of a worker: `bench.measure.worker_process.WorkerProcess`."""

    def ask(self, request: Request, timeout_s: float) -> Reply:
        """Send `request` and wait for the answer; raises WorkerFailed."""


class CeilingTurns:
    """The turns of one setting's ceilings in one worker.

    The kernels are chosen before the first turn. The first failure ends the turns, and `failure` says why.
    """

    def __init__(self, worker: Asked, setting: Setting) -> None:
        self._worker, self._setting = worker, setting
        self._chosen = False
        self.failure: str | None = None

    def take(
        self, ceiling: CeilingName, *, cell: str, process: int, number: int, order: int, warmup: bool
    ) -> CeilingSample | None:
        """Take one turn of `ceiling` in round `number` of a cell; return None from the first failure on."""
        if self.failure is not None:
            return None
        try:
            self._choose()
            taken = self._worker.ask(TakeCeilingTurn(ceiling=ceiling), TIMEOUT_S)
        except WorkerFailed as failure:
            self.failure = failure.error
            return None
        assert isinstance(taken, CeilingTurnTaken)
        return CeilingSample(
            cell=cell,
            ceiling=ceiling,
            kernel=taken.kernel,
            process=process,
            round=number,
            order=order,
            warmup=warmup,
            amount=taken.amount,
            pass_ns=taken.pass_ns,
            cache_bytes=taken.cache_bytes,
            covariates=taken.covariates,
        )

    def _choose(self) -> None:
        if not self._chosen:
            device, dtype, n_threads = self._setting
            wanted = ChooseCeilings(device=device, dtype=dtype, n_threads=n_threads)
            assert isinstance(self._worker.ask(wanted, TIMEOUT_S), CeilingsChosen)
            self._chosen = True


def setting_of(group: Group) -> Setting:
    """Return what the ceilings of a group's cases are measured under."""
    return group.device, group.dtype, group.n_threads


def settings_of(plans: Iterable[CasePlan]) -> list[Setting]:
    """Return the settings that the cases of a plan run under, each once."""
    return list(dict.fromkeys(setting_of(item.case.group) for item in plans))


def settings_here(environment: Environment) -> list[Setting]:
    """Return what `kvbench env` measures: float32 and bfloat16 with one thread and with all, and the GPU."""
    return [
        (device.name, dtype, count)
        for device in DEVICES.values()
        if device.is_in(environment)
        for count in device.ceiling_threads(environment.cores)
        for dtype in device.ceiling_dtypes
    ]


def survey(
    settings: Sequence[Setting], fork: Callable[[int], WorkerProcess], say: Callable[[str], None]
) -> list[Ceiling]:
    """Measure the ceilings of each setting once, in a worker per device and number of threads.

    `fork` makes a worker for so many threads; where it raises WorkerFailed, the settings of that worker have no
    ceilings. `say` gets a line for each ceiling, and for a setting that has none.
    """
    found: list[Ceiling] = []
    for place in dict.fromkeys((device, n_threads) for device, _, n_threads in settings):
        here = [setting for setting in settings if (setting[0], setting[2]) == place]
        try:
            forked = fork(place[1])
        except WorkerFailed as failure:
            for setting in here:
                say(f"no ceilings, {_words(setting)}: {failure.error}")
            continue
        with forked as worker:
            for setting in here:
                found += _survey_one(worker, setting, say)
    return found


def one_line(ceiling: Ceiling) -> str:
    """Describe a ceiling in a line, as in `read bandwidth, cpu float32, 2 threads: 41.3 GB/s (dot)`."""
    kind, unit = ("read bandwidth", "GB/s") if ceiling.ceiling == "read_bandwidth" else ("GEMM", "GFLOP/s")
    setting = _words((ceiling.device, ceiling.dtype, ceiling.n_threads))
    return f"{kind}, {setting}: {ceiling.per_s / 1e9:.4g} {unit} ({ceiling.kernel})"


def _words(setting: Setting) -> str:
    device, dtype, n_threads = setting
    return f"{device} {dtype}, {n_threads} thread{'s' if n_threads > 1 else ''}"


def _survey_one(worker: WorkerProcess, setting: Setting, say: Callable[[str], None]) -> Iterator[Ceiling]:
    turns = CeilingTurns(worker, setting)
    for name in CEILINGS:
        taken = turns.take(name, cell="", process=0, number=0, order=0, warmup=False)
        if taken is None:
            say(f"no ceilings, {_words(setting)}: {turns.failure}")
            return
        device, dtype, n_threads = setting
        ceiling = Ceiling(
            ceiling=taken.ceiling,
            device=device,
            dtype=dtype,
            n_threads=n_threads,
            kernel=taken.kernel,
            per_s=taken.amount / statistics.median(taken.pass_ns) * 1e9,
        )
        say(one_line(ceiling))
        yield ceiling
