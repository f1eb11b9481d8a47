"""The ceilings' turns beside a cell's: a worker of their own, whose failure costs no case."""

from __future__ import annotations

from typing import Protocol, get_args

from bench.case import Group
from bench.measure.worker_process import WorkerFailed
from bench.protocol import CeilingsChosen, CeilingTurnTaken, ChooseCeilings, Reply, Request, TakeCeilingTurn
from bench.record import CeilingName, CeilingSample

CEILINGS: tuple[CeilingName, ...] = get_args(CeilingName)
TIMEOUT_S = 120.0
"""Of a request that takes a second at most on a machine at rest."""
ROUND_S = 0.15
"""What a turn of each ceiling takes together, roughly."""


class Asked(Protocol):
    """The worker's end: `bench.measure.worker_process.WorkerProcess`."""

    def ask(self, request: Request, timeout_s: float) -> Reply:
        """Send `request` and wait for the answer; raises WorkerFailed."""


class CeilingTurns:
    """The turns of one group's ceilings in one set of processes.

    The kernels are chosen before the first turn. The first failure ends the turns, and `failure` says why.
    """

    def __init__(self, arm: Asked, group: Group) -> None:
        self._arm, self._group = arm, group
        self._chosen = False
        self.failure: str | None = None

    def take(
        self, ceiling: CeilingName, *, cell: str, process: int, number: int, order: int, warmup: bool
    ) -> CeilingSample | None:
        """One turn of `ceiling` in round `number` of a cell; None from the first failure on."""
        if self.failure is not None:
            return None
        try:
            self._choose()
            taken = self._arm.ask(TakeCeilingTurn(ceiling=ceiling), TIMEOUT_S)
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
            group = self._group
            wanted = ChooseCeilings(device=group.device, dtype=group.dtype, n_threads=group.n_threads)
            assert isinstance(self._arm.ask(wanted, TIMEOUT_S), CeilingsChosen)
            self._chosen = True
