"""`kvbench fit`: the context that it names fits, one token more does not, and what ends it is named."""

import json
import math

import pytest
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from bench.measure.fit import fits, need
from bench.measure.plan import describe
from kvcache.compiled.products import FEW_ROWS
from tests.commandline import kvbench, refused
from tests.compiled.families import family


@pytest.mark.parametrize("strategy", ["dynamic", "static", "fp8", "compiled"])
def test_one_token_more_does_not_fit(strategy: str) -> None:
    memory = 520_000_000
    done = kvbench("fit", "-m", "random:tiny", "--memory", "520MB", "-b", "8", "--strategies", strategy, *JSON)
    (row,) = json.loads(done.stdout)
    assert (row["limited_by"], row["memory_bytes"]) == ("memory", memory)
    totals = [need(describe("random:tiny", ""), strategy, "float32", 8, row["max_context"] + more) for more in (0, 1)]
    assert totals[0] is not None
    assert totals[1] is not None
    assert totals[0].total <= memory < totals[1].total
    assert totals[0].kv == row["kv_bytes_allocated"]


JSON = ("--no-ceilings", "-o", "json")


@pytest.mark.parametrize(
    ("memory", "limit", "context"), [("64GiB", "positions", 4096), ("1MB", "weights", 0), ("300 MB", "memory", 0)]
)
def test_what_ends_a_context_is_named(memory: str, limit: str, context: int) -> None:
    done = kvbench("fit", "-m", "random:tiny", "--memory", memory, "--strategies", "dynamic", *JSON)
    (row,) = json.loads(done.stdout)
    assert (row["limited_by"], row["max_context"]) == (limit, context)
    assert row["tokens_per_s"] is None


def test_a_kind_that_cannot_run_says_why_and_batches_have_rows() -> None:
    arguments = ("-m", "random:tiny", "--memory", "2GiB", "-b", "1,2", "--strategies", "dynamic,offloaded")
    printed = kvbench("fit", *arguments, "--no-ceilings").stdout
    assert printed.count("| dynamic ") == 2
    assert "- offloaded: offloaded moves a cache between a GPU and main memory" in printed


@pytest.mark.parametrize("strategy", ["dynamic", "static"])
def test_one_sequence_more_does_not_fit(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.machine import cgroup
    from bench.machine.kernels import Rates

    limit = 460_000_000  # a container's
    monkeypatch.setattr(cgroup, "memory_limit_bytes", lambda: float(limit))
    monkeypatch.setattr("bench.measure.fit.rates_here", lambda *_: Rates(flops_per_s=math.inf, bytes_per_s=1e9))
    asked = ("fit", "-m", "random:tiny", "--context", "300", "--strategies", strategy)
    (row,) = json.loads(kvbench(*asked, "-o", "json").stdout)
    assert (row["memory_bytes"], row["max_context"], row["limited_by"]) == (limit, 300, "memory")
    sizes = [need(describe("random:tiny", ""), strategy, "float32", row["batch_size"] + more, 300) for more in (0, 1)]
    assert sizes[0] is not None
    assert sizes[1] is not None
    assert sizes[0].total <= limit < sizes[1].total
    assert row["kv_bytes_allocated"] == sizes[0].kv
    one_s_bytes = row["weights_bytes"] + sizes[0].kv
    assert row["tokens_per_s"] == pytest.approx(row["batch_size"] * 1e9 / one_s_bytes, rel=0.5)
    assert "largest batch" in kvbench(*asked, "--no-ceilings").stdout


@pytest.mark.parametrize("strategy", ["dynamic", "static"])
def test_a_batch_ends_at_the_largest_context_that_it_has(strategy: str) -> None:
    model, asked = describe("random:tiny", ""), ([strategy], "float32", [8], 520_000_000, None)
    (row,) = fits(model, *asked)
    assert row.max_context is not None
    here, beyond = (next(fits(model, *asked, row.max_context + more)).batch_size for more in (0, 1))
    assert beyond < 8 <= here


def test_a_context_that_fits_no_batch_and_one_that_the_model_has_not() -> None:
    few = ("fit", "-m", "random:tiny", "--context", "300", "--strategies", "dynamic")
    (row,) = json.loads(kvbench(*few, "--memory", "300MB", *JSON).stdout)
    assert (row["batch_size"], row["max_context"], row["limited_by"]) == (0, 300, "memory")
    assert "4096 positions" in refused("fit", "-m", "random:tiny", "--context", "4097")
    assert "--batch-size" in refused(*few, "-b", "2")


def mixture() -> MixtralForCausalLM:
    """The model of a `py:` spec."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4, vocab_size=97))


def test_a_batch_is_no_larger_than_a_strategy_takes() -> None:
    kinds = "dynamic,compiled,compiled-int8"
    asked = ("fit", "-m", f"py:{__name__}:mixture", "--memory", "2GiB", "--strategies", kinds)
    dynamic, *compiled = json.loads(kvbench(*asked, "--context", "40", *JSON).stdout)
    assert dynamic["batch_size"] > FEW_ROWS
    assert [(row["batch_size"], row["limited_by"]) for row in compiled] == [(FEW_ROWS, "sequences")] * 2
    dynamic, *compiled = json.loads(kvbench(*asked, "-b", str(FEW_ROWS + 1), *JSON).stdout)
    assert dynamic["error"] is None
    assert [row["error"] for row in compiled] == [
        f"{row['strategy']} takes at most {FEW_ROWS} sequences of this model" for row in compiled
    ]


def test_a_kind_that_fails_costs_no_other_row(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvcache.proof.rehearsal import Rehearsal
    from kvcache.proof.unknown_numbers import NotRehearsable

    refusal = Rehearsal.refusal

    def failing(self: Rehearsal, strategy: str) -> str | None:
        if strategy == "static":
            raise NotRehearsable("it reads values")
        return refusal(self, strategy)

    monkeypatch.setattr(Rehearsal, "refusal", failing)
    kinds = "dynamic,static,cache:tests.unfit_caches:growing,cache:nowhere:make"
    rows = json.loads(kvbench("fit", "-m", "random:tiny", "--memory", "2GiB", "--strategies", kinds, *JSON).stdout)
    assert [row["max_context"] for row in rows] == [4096, None, None, None]
    reasons = [None, "it reads values", "nothing is known of its bytes on this model", "No module named 'nowhere'"]
    assert all(reason is None or reason in row["error"] for row, reason in zip(rows, reasons, strict=True))


def test_speed_is_predicted_from_the_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.machine.kernels import Rates

    monkeypatch.setattr("bench.measure.fit.rates_here", lambda *_: Rates(flops_per_s=math.inf, bytes_per_s=1e9))
    done = kvbench("fit", "-m", "random:tiny", "--memory", "2GiB", "--strategies", "dynamic", "-o", "json")
    (row,) = json.loads(done.stdout)
    kv_bytes = row["kv_bytes_allocated"]
    assert 1e9 / (row["weights_bytes"] + kv_bytes) < row["tokens_per_s"] < 1e9 / kv_bytes  # of tables a row is read


def test_a_context_is_given_where_no_speed_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """What its experts multiply depends on which are chosen, what its cache holds does not."""
    from bench.machine.kernels import Rates

    monkeypatch.setattr("bench.measure.fit.rates_here", lambda *_: Rates(flops_per_s=math.inf, bytes_per_s=1e9))
    asked = ("fit", "-m", "py:tests.measure.test_case_costs:asking", "--memory", "2GiB", "--strategies", "dynamic")
    (row,) = json.loads(kvbench(*asked, "-o", "json").stdout)
    assert (row["error"], row["limited_by"], row["tokens_per_s"]) == (None, "positions", None)


def without_a_formula() -> PreTrainedModel:
    """The model of a `py:` spec."""
    return family("olmo2")


def test_chunks_of_compiled_are_whole_on_a_family_without_a_formula() -> None:
    model = describe(f"py:{__name__}:without_a_formula", "")
    sizes = [need(model, "compiled", "float32", 1, n_tokens) for n_tokens in (1025, 1088, 1089)]
    chunks = [each.kv for each in sizes if each is not None]
    assert chunks[0] == chunks[1]
    assert chunks[2] * 17 == chunks[1] * 18


@pytest.mark.parametrize("word", ["16", "0GiB", "much", "-1GB", "4XB"])
def test_a_size_that_is_none_is_refused(word: str) -> None:
    if word == "16":  # bytes: not even the weights fit
        assert "weights" in kvbench("fit", "-m", "random:tiny", "--memory", word, "--no-ceilings").stdout
    else:
        assert "--memory" in refused("fit", "-m", "random:tiny", "--memory", word)
    assert "--strategies" in refused("fit", "-m", "random:tiny", "--strategies", "naive")


def test_no_extension_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which bytes quanto takes is arithmetic: whether it is installed is enough."""
    pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed: pip install 'kvbench[quantized]'")

    def compiled() -> None:
        raise AssertionError("the extension is compiled")

    monkeypatch.setattr("kvcache.caches.quanto.build_extension", compiled)
    printed = kvbench("fit", "-m", "random:tiny", "--memory", "2GiB", "--strategies", "quanto-int4", *JSON).stdout
    (row,) = json.loads(printed)
    assert (row["max_context"], row["error"]) == (4096, None)
