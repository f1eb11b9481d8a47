"""The room that a plan needs: what a compiler writes, and the logits that judge a lossy strategy."""

import re
from types import SimpleNamespace

import pytest

from bench.manifest import CasePlan
from bench.measure.fit import need
from bench.measure.plan import COMPILER_BYTES, in_words, memory_bytes, temporary_bytes
from bench.naming import namer
from kvcache.models import describe
from kvcache.proof.judging import POSITIONS
from kvcache.proof.quality import RECALLED
from tests.handmade import make_case, make_plan

BATCH_SIZE = 2
JUDGED = BATCH_SIZE * (POSITIONS + RECALLED) * 4 * describe("random:tiny").vocab_size


def planned(strategy: str) -> list[CasePlan]:
    """A plan of one case in float32."""
    fields = {"model": "random:tiny", "batch_size": BATCH_SIZE, "n_gen": 4}
    return [make_plan(make_case(strategy, 8, **fields))]


@pytest.mark.parametrize("strategy", ["compiled", "compiled-int8", "compiled-int4"])
def test_whatever_compiles_needs_room_for_the_compiler(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    here = temporary_bytes(planned(strategy))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    assert here - temporary_bytes(planned(strategy)) == COMPILER_BYTES


@pytest.mark.parametrize("strategy", ["fp8", "cache:mine:make"])
def test_a_lossy_case_needs_room_for_the_text_that_judges_it(strategy: str) -> None:
    lossy, exact = planned(strategy), planned("dynamic")
    assert temporary_bytes(lossy) - temporary_bytes(exact) == JUDGED
    assert memory_bytes(lossy) - memory_bytes(exact) == 2 * JUDGED  # the strategy's worker and the reference's


def test_a_case_that_does_not_fit_shows_all_that_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.measure.plan.DEVICES", {"cpu": SimpleNamespace(available_memory_bytes=lambda: 10**8)})
    (plan,) = planned("dynamic")
    words = in_words(plan, namer([plan.case]))
    assert words.endswith("DOES NOT FIT the 0.1 GB that are free")
    sizes = [float(size) for size in re.findall(r"(?:weights|cache|workspace) ([\d.e-]+) GB", words)]
    found = need(describe("random:tiny"), "dynamic", "float32", BATCH_SIZE, plan.case.capacity)
    assert found is not None
    assert sum(sizes) == pytest.approx(found.total / 1e9, rel=0.01)
