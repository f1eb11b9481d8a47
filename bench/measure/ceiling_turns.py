"""The ceilings' turns: beside a cell's, in a worker of their own whose failure costs no case, or once per setting."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import get_args

import msgspec

from bench.case import Group
from bench.machine.devices import DEVICES
from bench.manifest import CasePlan, Ceiling, CeilingName, Environment
from bench.measure.worker_process import WorkerFailed, WorkerProcess
from bench.protocol import CeilingsChosen, CeilingTurnTaken, ChooseCeilings, TakeCeilingTurn

CEILINGS: tuple[CeilingName, ...] = get_args(CeilingName)
TIMEOUT_S = 120.0
"""Of a request that takes a second at most on a machine at rest."""
ROUND_S = 0.15
"""What a turn of each ceiling takes together, roughly."""


class CeilingTurns:
    """The turns of one setting's ceilings in one worker, which chooses its kernels before the first."""

    def __init__(self, worker: WorkerProcess, setting: ChooseCeilings) -> None:
        self._worker, self._setting = worker, setting
        self._chosen = False

    def take(self, ceiling: CeilingName) -> CeilingTurnTaken:
        """Take one turn of `ceiling`. Raises WorkerFailed, after which there are no more."""
        if not self._chosen:
            assert isinstance(self._worker.ask(self._setting, TIMEOUT_S), CeilingsChosen)
            self._chosen = True
        taken = self._worker.ask(TakeCeilingTurn(ceiling=ceiling), TIMEOUT_S)
        assert isinstance(taken, CeilingTurnTaken)
        return taken


def setting_of(group: Group) -> ChooseCeilings:
    """Return what the ceilings of a group's cases are measured under."""
    return ChooseCeilings(device=group.device, dtype=group.dtype, n_threads=group.n_threads)


def settings_of(plans: Iterable[CasePlan]) -> list[ChooseCeilings]:
    """Return the settings that the cases of a plan run under, each once."""
    return list(dict.fromkeys(setting_of(item.case.group) for item in plans))


def settings_here(environment: Environment) -> list[ChooseCeilings]:
    """Return what `kvbench env` measures: float32 and bfloat16 with one thread and with all, and the GPU."""
    return [
        ChooseCeilings(device=device.name, dtype=dtype, n_threads=count)
        for device in DEVICES.values()
        if device.is_in(environment)
        for count in device.ceiling_threads(environment.cores)
        for dtype in device.ceiling_dtypes
    ]


def survey(
    settings: Sequence[ChooseCeilings], fork: Callable[[int], WorkerProcess], say: Callable[[str], None]
) -> list[Ceiling]:
    """Measure the ceilings of each setting once, in a worker per device and number of threads.

    `fork` makes a worker for so many threads; where it raises WorkerFailed, the settings of that worker have no
    ceilings. `say` gets a line for each ceiling, and for a setting that has none.
    """
    found: list[Ceiling] = []
    for device, n_threads in dict.fromkeys((setting.device, setting.n_threads) for setting in settings):
        here = [setting for setting in settings if (setting.device, setting.n_threads) == (device, n_threads)]
        try:
            forked = fork(n_threads)
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
    return f"{kind}, {_words(ceiling)}: {ceiling.per_s / 1e9:.4g} {unit} ({ceiling.kernel})"


def _words(of: ChooseCeilings | Ceiling) -> str:
    return f"{of.device} {of.dtype}, {of.n_threads} thread{'s' if of.n_threads > 1 else ''}"


def _survey_one(worker: WorkerProcess, setting: ChooseCeilings, say: Callable[[str], None]) -> Iterator[Ceiling]:
    turns = CeilingTurns(worker, setting)
    for name in CEILINGS:
        try:
            taken = turns.take(name)
        except WorkerFailed as failure:
            say(f"no ceilings, {_words(setting)}: {failure.error}")
            return
        per_s = taken.amount / statistics.median(taken.pass_ns) * 1e9
        ceiling = Ceiling(ceiling=name, kernel=taken.kernel, per_s=per_s, **msgspec.structs.asdict(setting))
        say(one_line(ceiling))
        yield ceiling
