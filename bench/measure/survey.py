"""The ceilings measured once, each setting in a worker of its own: what a run's manifest and `kvbench env` show."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence

from bench.case import DeviceName, Group
from bench.machine.devices import DEVICES
from bench.measure.ceiling_turns import CEILINGS, CeilingTurns
from bench.measure.worker_process import WorkerProcess
from bench.record import CasePlan, Ceiling, CeilingSample, Environment

Setting = tuple[DeviceName, str, int]
"""Device, dtype, threads."""


def settings_of(plans: Iterable[CasePlan]) -> list[Setting]:
    """The settings that the cases of a plan run under, each once."""
    return list(dict.fromkeys((item.case.device, item.case.dtype, item.case.n_threads) for item in plans))


def settings_here(environment: Environment) -> list[Setting]:
    """What `kvbench env` measures: float32 and bfloat16 with one thread and with all; the GPU if there is one."""
    return [
        (device.name, dtype, count)
        for device in DEVICES.values()
        if device.is_in(environment)
        for count in device.ceiling_threads(environment.cores)
        for dtype in device.ceiling_dtypes
    ]


def survey(settings: Sequence[Setting], say: Callable[[str], None]) -> list[Ceiling]:
    """The ceilings of each setting; takes some seconds, most of them for starting a worker per number of threads.

    `say` is told each one found, and which setting has none and why.
    """
    found: list[Ceiling] = []
    groups = [
        Group(model="", device=device, dtype=dtype, attn_implementation="", n_threads=n_threads)
        for device, dtype, n_threads in settings
    ]
    for place in dict.fromkeys((group.device, group.n_threads) for group in groups):
        members = [group for group in groups if (group.device, group.n_threads) == place]
        with WorkerProcess(members[0]) as arm:
            for group in members:
                found += _survey_one(arm, group, say)
    return found


def told(ceiling: Ceiling) -> str:
    """A ceiling in a line, as in `read bandwidth, cpu float32, 2 threads: 41.3 GB/s (dot)`."""
    kind, unit = ("read bandwidth", "GB/s") if ceiling.ceiling == "read_bandwidth" else ("GEMM", "GFLOP/s")
    threads = f"{ceiling.n_threads} thread{'s' if ceiling.n_threads > 1 else ''}"
    setting = f"{ceiling.device} {ceiling.dtype}, {threads}"
    return f"{kind}, {setting}: {ceiling.per_s / 1e9:.4g} {unit} ({ceiling.kernel})"


def _survey_one(arm: WorkerProcess, group: Group, say: Callable[[str], None]) -> Iterator[Ceiling]:
    turns = CeilingTurns(arm, group)
    for ceiling in CEILINGS:
        taken = turns.take(ceiling, cell="", process=0, number=0, order=0, warmup=False)
        if taken is None:
            say(f"no ceilings, {group.device} {group.dtype}, {group.n_threads} threads: {turns.failure}")
            return
        found = _ceiling(taken, group)
        say(told(found))
        yield found


def _ceiling(taken: CeilingSample, group: Group) -> Ceiling:
    return Ceiling(
        ceiling=taken.ceiling,
        device=group.device,
        dtype=group.dtype,
        n_threads=group.n_threads,
        kernel=taken.kernel,
        per_s=taken.amount / statistics.median(taken.pass_ns) * 1e9,
    )
