"""The ceilings measured once: which settings, in how many workers, and what is said where one fails. No real worker."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import msgspec
import pytest

from bench.case import Case
from bench.manifest import CasePlan, Ceiling
from bench.measure.ceiling_turns import CeilingTurns, one_line, setting_of, settings_here, settings_of, survey
from bench.measure.worker_process import WorkerFailed
from bench.protocol import CeilingsChosen, CeilingTurnTaken, ChooseCeilings, Reply, Request
from bench.record import Covariates
from tests.handmade import ENVIRONMENT, grid, make_case, make_plan


class FakeArm:
    """Reads 200 bytes in its median pass of 4 ns; refuses `lacking`."""

    started: ClassVar[list[int]] = []
    lacking: ClassVar[str] = ""

    def __init__(self, n_threads: int) -> None:
        self.started.append(n_threads)

    def ask(self, request: Request, timeout_s: float) -> Reply:
        if isinstance(request, ChooseCeilings):
            if request.dtype == self.lacking:
                raise WorkerFailed("failed", "no kernel", alive=True)
            return CeilingsChosen(kernels={"read_bandwidth": "dot", "gemm": "dot"})
        return CeilingTurnTaken(
            kernel="dot", amount=200, pass_ns=[9, 4, 3], cache_bytes=1 << 25, covariates=Covariates()
        )

    def __enter__(self) -> FakeArm:
        return self

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture(autouse=True)
def _fake_arms() -> None:
    FakeArm.started, FakeArm.lacking = [], ""


def setting(dtype: str, n_threads: int) -> ChooseCeilings:
    return ChooseCeilings(device="cpu", dtype=dtype, n_threads=n_threads)


SETTINGS = [setting("float32", 1), setting("bfloat16", 1), setting("float32", 2)]


def test_a_rate_is_that_of_the_median_pass_and_its_name_has_a_unit() -> None:
    said: list[str] = []
    found = survey(SETTINGS[-1:], FakeArm, said.append)
    assert [(ceiling.name, ceiling.per_s) for ceiling in found] == [
        ("read_bandwidth_bytes_per_s cpu float32 t2", 50e9),
        ("gemm_flop_per_s cpu float32 t2", 50e9),
    ]
    assert said == [
        "read bandwidth, cpu float32, 2 threads: 50 GB/s (dot)",
        "GEMM, cpu float32, 2 threads: 50 GFLOP/s (dot)",
    ]


def test_settings_with_the_same_threads_share_a_worker() -> None:
    assert len(survey(SETTINGS, FakeArm, lambda _: None)) == 6
    assert FakeArm.started == [1, 2]


def test_a_setting_that_fails_is_told_and_costs_no_other() -> None:
    FakeArm.lacking, said = "bfloat16", []
    found = survey(SETTINGS, FakeArm, said.append)
    assert {(ceiling.dtype, ceiling.n_threads) for ceiling in found} == {("float32", 1), ("float32", 2)}
    assert [text for text in said if text.startswith("no ceilings")] == [
        "no ceilings, cpu bfloat16, 1 thread: no kernel"
    ]


def test_a_worker_that_cannot_be_forked_costs_its_own_settings_alone() -> None:
    def fork(n_threads: int) -> FakeArm:
        if n_threads == 1:
            raise WorkerFailed("failed", "no worker could be forked", alive=False)
        return FakeArm(n_threads)

    said: list[str] = []
    assert {ceiling.n_threads for ceiling in survey(SETTINGS, fork, said.append)} == {2}
    assert said[:2] == [
        f"no ceilings, cpu {dtype}, 1 thread: no worker could be forked" for dtype in ("float32", "bfloat16")
    ]


def test_the_settings_of_a_plan_and_of_this_machine() -> None:
    cases = [*grid(["naive", "dynamic"], [8, 16]), *grid(["dynamic"], [8], dtype="bfloat16", n_threads=1)]
    assert settings_of(map(make_plan, cases)) == [setting("float32", 2), setting("bfloat16", 1)]
    here = settings_here(ENVIRONMENT)
    assert here == [setting(dtype, count) for count in (1, 2) for dtype in ("float32", "bfloat16")]
    with_gpu = settings_here(msgspec.structs.replace(ENVIRONMENT, gpu="H200"))
    assert {found.dtype for found in with_gpu if found.device == "cuda"} == {"float32", "bfloat16", "float16"}


def small_plan(case: Case, **fields: Any) -> CasePlan:
    return msgspec.structs.replace(make_plan(case), **fields)


def test_a_cell_is_held_against_reads_of_its_largest_step_and_products_of_its_prompt() -> None:
    linears = ((8, 4), (8, 16))
    costs = make_plan(make_case("dynamic", 8)).decode
    assert costs is not None
    naive, cached = (
        small_plan(make_case(strategy, 8, batch_size=2), decode=replace(costs, bytes=bytes_), linears=linears)
        for strategy, bytes_ in (("naive", 300 * costs.forward_calls), ("dynamic", 400 * costs.forward_calls + 1))
    )
    found = setting_of([naive, cached])
    assert (found.device, found.dtype, found.n_threads) == ("cpu", "float32", 2)
    assert found.read_bytes == 400
    assert found.products == ((16, 8, 4), (16, 8, 16))
    assert setting_of([cached, naive]) == found


def test_what_a_step_of_unknown_costs_reads_is_the_weights() -> None:
    unknown = small_plan(make_case("dynamic", 8), prefill=None, decode=None, weights_bytes=77)
    assert setting_of([unknown]).read_bytes == 77
    prefill_alone = small_plan(make_case("dynamic", 8, n_gen=1), weights_bytes=77)
    assert setting_of([prefill_alone]).read_bytes == 100  # what `make_plan` gives a forward


def test_one_row_is_no_gemm_and_very_many_are_no_faster() -> None:
    linears = tuple((8, width) for width in range(1, 20))
    assert setting_of([small_plan(make_case("dynamic", 1), linears=linears)]).products == ()
    products = setting_of([small_plan(make_case("dynamic", 500, batch_size=100), linears=linears)]).products
    assert products == tuple((2048, 8, width) for width in range(14, 20))


def test_kernels_are_chosen_anew_only_for_another_setting() -> None:
    asked: list[Request] = []

    class Watched(FakeArm):
        def ask(self, request: Request, timeout_s: float) -> Reply:
            asked.append(request)
            return super().ask(request, timeout_s)

    turns = CeilingTurns(Watched(2))  # type: ignore[arg-type]  # it stands for a worker
    large = msgspec.structs.replace(SETTINGS[0], read_bytes=5)
    for wanted in (SETTINGS[0], SETTINGS[0], large, msgspec.structs.replace(large), SETTINGS[0]):
        turns.take("gemm", wanted)
    assert [request for request in asked if isinstance(request, ChooseCeilings)] == [SETTINGS[0], large, SETTINGS[0]]


def test_a_worker_of_another_revision_may_know_fewer_fields() -> None:
    """And then its reply has no `read_bytes`, so that the table keeps to the rule of older runs."""
    request = msgspec.structs.replace(SETTINGS[0], read_bytes=5, products=((2, 3, 4),))

    class Older(msgspec.Struct, tag="choose-ceilings"):
        device: str
        dtype: str
        n_threads: int

    assert msgspec.json.decode(msgspec.json.encode(request), type=Older).dtype == "float32"
    taken = CeilingTurnTaken(kernel="dot", amount=200, pass_ns=[9], cache_bytes=1)
    older = {name: value for name, value in msgspec.to_builtins(taken).items() if name != "read_bytes"}
    assert msgspec.convert(older, CeilingTurnTaken).read_bytes is None


def test_a_ceiling_in_words() -> None:
    fields = {"device": "cpu", "dtype": "bfloat16", "n_threads": 1, "kernel": "mm 512x1024x1024", "per_s": 4.3e11}
    ceiling = msgspec.convert({"ceiling": "gemm", **fields}, Ceiling)
    assert one_line(ceiling) == "GEMM, cpu bfloat16, 1 thread: 430 GFLOP/s (mm 512x1024x1024)"
    read = msgspec.structs.replace(ceiling, ceiling="read_bandwidth", per_s=4e10, kernel="dot", read_bytes=536_870_912)
    assert one_line(read) == "read bandwidth, cpu bfloat16, 1 thread: 40 GB/s (dot of 536.9 MB)"
