"""The ceilings' turns: beside a cell's, in a worker of their own whose failure costs no case, or once per setting."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import get_args

from bench.case import DeviceName
from bench.machine.devices import DEVICES
from bench.manifest import CasePlan, Ceiling, CeilingName, Environment
from bench.measure.worker_process import WorkerFailed, WorkerProcess
from bench.naming import plural
from bench.protocol import CeilingsChosen, CeilingTurnTaken, ChooseCeilings, TakeCeilingTurn

CEILINGS: tuple[CeilingName, ...] = get_args(CeilingName)
TIMEOUT_S = 120.0
"""Of a request that takes a second at most on a machine at rest."""
CHOOSE_S, ROUND_S = 1.0, 0.15
"""What choosing for a cell takes, and a turn of each ceiling together, roughly."""
MOST_ROWS = 2048
"""Products of more rows are no faster."""
MOST_SHAPES = 6
"""Of a model with more shapes of linear layers the largest count: small ones are never the fastest."""


class CeilingTurns:
    """The turns of the ceilings in one worker, which chooses its kernels anew when the setting changes."""

    def __init__(self, worker: WorkerProcess) -> None:
        self._worker = worker
        self._chosen: ChooseCeilings | None = None

    def take(self, ceiling: CeilingName, setting: ChooseCeilings) -> CeilingTurnTaken:
        """Take one turn of `ceiling` under `setting`. Raises WorkerFailed, after which there are no more."""
        if self._chosen != setting:
            assert isinstance(self._worker.ask(setting, TIMEOUT_S), CeilingsChosen)
            self._chosen = setting
        taken = self._worker.ask(TakeCeilingTurn(ceiling=ceiling), TIMEOUT_S)
        assert isinstance(taken, CeilingTurnTaken)
        return taken


def setting_of(cell: Sequence[CasePlan]) -> ChooseCeilings:
    """Return what the ceilings of a cell are measured under: reads as large as its largest step, its prompt's products.

    A step reads weights and cache; where nothing is known of it, the weights.
    """
    case = cell[0].case
    rows = min(case.batch_size * case.n_prompt, MOST_ROWS)
    linears = cell[0].linears[-MOST_SHAPES:] if rows > 1 else ()
    return ChooseCeilings(
        device=case.device,
        dtype=case.dtype,
        n_threads=case.n_threads,
        read_bytes=max(item.step_bytes for item in cell),
        products=tuple((rows, *linear) for linear in linears),
    )


def settings_of(plans: Iterable[CasePlan]) -> list[ChooseCeilings]:
    """Return the settings that the cases of a plan run under, of no cell, each once."""
    groups = [item.case.group for item in plans]
    return list(dict.fromkeys(_of_no_cell(group.device, group.dtype, group.n_threads) for group in groups))


def _of_no_cell(device: DeviceName, dtype: str, n_threads: int) -> ChooseCeilings:
    return ChooseCeilings(device=device, dtype=dtype, n_threads=n_threads)


def settings_here(environment: Environment) -> list[ChooseCeilings]:
    """Return what `kvbench env` measures: float32 and bfloat16 with one thread and with all, and the GPU."""
    return [
        _of_no_cell(device.name, dtype, count)
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
    return f"{kind}, {_words(ceiling)}: {ceiling.per_s / 1e9:.4g} {unit} ({ceiling.by})"


def _words(of: ChooseCeilings | Ceiling) -> str:
    return f"{of.device} {of.dtype}, {plural(of.n_threads, 'thread')}"


def _survey_one(worker: WorkerProcess, setting: ChooseCeilings, say: Callable[[str], None]) -> Iterator[Ceiling]:
    turns = CeilingTurns(worker)
    for name in CEILINGS:
        try:
            taken = turns.take(name, setting)
        except WorkerFailed as failure:
            say(f"no ceilings, {_words(setting)}: {failure.error}")
            return
        per_s = taken.amount / statistics.median(taken.pass_ns) * 1e9
        ceiling = Ceiling(
            ceiling=name,
            device=setting.device,
            dtype=setting.dtype,
            n_threads=setting.n_threads,
            kernel=taken.kernel,
            per_s=per_s,
            read_bytes=taken.read_bytes,
        )
        say(one_line(ceiling))
        yield ceiling
