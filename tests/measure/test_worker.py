"""The worker's answers, in process: what it times, what it refuses, and how it reads errors."""

import io
import math
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import msgspec
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench.case import Case, Sweep, naive_steps
from bench.machine.clock import Times
from bench.measure import references
from bench.measure.plan import plan
from bench.measure.references import token_ids
from bench.protocol import (
    CheckCase,
    Checked,
    Done,
    GoOn,
    Judge,
    Judged,
    Load,
    Loaded,
    MakeReference,
    MakeText,
    Paused,
    Refused,
    Reply,
    Request,
    TakeTurn,
    TextMade,
    TurnTaken,
)
from bench.worker import Worker, serve
from kvcache.arithmetic.costs import Costs
from kvcache.caches.contract import UnfitCache, Unsupported
from kvcache.caches.sink_window import SinkWindowLayer
from kvcache.compiled import choice
from kvcache.models import ModelError
from kvcache.models.skeleton import is_out_of_memory
from kvcache.proof import judging
from kvcache.strategies.cached import Cached, Dynamic
from kvcache.strategies.naive import Naive
from kvcache.strategies.strategy import Strategy
from kvcache.strategies.tolerance import tolerance
from tests.families import CONFIGS, family, rounding_by_length, seeing_the_future, unrepeatable
from tests.handmade import make_case
from tests.tiny import VOCAB_SIZE, llama_like, tiny


def tiny_case(strategy: str = "dynamic", **fields: Any) -> Case:
    return make_case(strategy, **({"model": "random:tiny", "n_prompt": 8, "n_gen": 5, "n_threads": 1} | fields))


def loaded(case: Case) -> Worker:
    worker = Worker()
    load = Load(group=case.group, strategy=case.strategy, naive_logits=case.naive_logits, seed=0)
    assert isinstance(worker.answer(load), Loaded)
    return worker


def checked(case: Case, folder: Path) -> tuple[Worker, Reply]:
    worker, path = loaded(case), str(folder / "reference.safetensors")
    assert worker.answer(MakeReference(case=case, path=path)) == Done()
    return worker, worker.answer(CheckCase(case=case, path=path))


@pytest.mark.parametrize("strategy", ["naive", "dynamic", "static", "hf-generate"])
@pytest.mark.parametrize("fields", [{}, {"n_depth": 6, "batch_size": 2}, {"n_gen": 1}])
def test_turn_stamps_every_step(strategy: str, fields: dict[str, int], tmp_path: Path) -> None:
    case = tiny_case(strategy, **fields)
    worker, reply = checked(case, tmp_path)
    assert isinstance(reply, Checked)
    assert reply.tokens_match == "true"
    assert (reply.kv_bytes_after_prefill > 0) == (strategy != "naive")
    for _ in range(2):
        turn = worker.answer(TakeTurn())
        assert isinstance(turn, TurnTaken)
        assert turn.steps == (naive_steps(case) if strategy == "naive" else list(range(1, case.n_gen)))
        assert len(turn.step_ns) == len(turn.steps)
        assert min([turn.prefill_ns, *turn.step_ns]) > 0


@pytest.mark.usefixtures("untraced")
def test_a_worker_says_which_kernels_it_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "LEAST_BYTES", math.inf)  # nothing is timed
    case = tiny_case("compiled", batch_size=2)
    worker, path = Worker(), str(tmp_path / "reference.safetensors")
    load = Load(group=case.group, strategy=case.strategy, naive_logits="last", seed=0, kernels_for=[2, 3])
    pinned: dict[str, str] = {}
    for _ in range(2):
        reply = worker.answer(msgspec.structs.replace(load, kernels=pinned or None))
        assert isinstance(reply, Loaded), reply
        assert {name.partition(", ")[2] for name in reply.kernels} == {
            *("prompt of 128", "prompt of 512"),
            *("step of 2", "step of 3"),
        }
        assert worker.answer(MakeReference(case=case, path=path)) == Done()
        found = worker.answer(CheckCase(case=case, path=path))
        assert isinstance(found, Checked), found
        assert found.kernels is not None
        assert found.kernels.items() <= reply.kernels.items()
        assert pinned.items() <= found.kernels.items()
        pinned = {name: "sum-4" for name in found.kernels if "step" in name}


def test_arms_of_a_cell_get_the_same_tokens() -> None:
    naive, cached = tiny_case("naive", n_depth=3), tiny_case("static", n_depth=3)
    for a, b in zip(token_ids(naive, 97), token_ids(cached, 97), strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)
    context, prompt = token_ids(tiny_case(batch_size=2), 97)
    assert context is None
    assert prompt.shape == (2, 8)


def judged(case: Case, folder: Path) -> Checked:
    worker, path, text = loaded(case), str(folder / "reference.safetensors"), str(folder / "text.safetensors")
    assert worker.answer(MakeReference(case=case, path=path)) == Done()
    made = worker.answer(MakeText(case=case, path=text, n_context=case.n_depth + case.n_prompt))
    assert isinstance(made, TextMade)
    assert made.writer == "dynamic"
    assert [len(row) for row in made.tokens] == [case.n_depth + case.n_prompt + 129] * case.batch_size
    assert isinstance(worker.answer(Judge(case=case, path=path, text=text, n_threads=1)), Judged)
    reply = worker.answer(CheckCase(case=case, path=path))
    assert isinstance(reply, Checked), reply
    assert isinstance(worker.answer(TakeTurn()), TurnTaken)
    return reply


@pytest.mark.parametrize("fields", [{"n_depth": 6, "batch_size": 2}, {"n_gen": 1}])
def test_a_lossy_strategy_is_judged_and_timed(fields: dict[str, int], tmp_path: Path) -> None:
    case = tiny_case("fp8", **fields)
    reply = judged(case, tmp_path)
    quality = reply.quality
    assert not reply.exact
    assert quality is not None
    assert quality.positions == len(quality.agreement_by_position) == 128
    assert 0 < quality.logit_kl < quality.logit_kl_p99 < 0.5
    assert 0 < quality.logit_kl_floor < 0.1
    assert 0.8 < quality.top1_agreement <= 1
    assert quality.recall_agreement is not None
    assert quality.recall_agreement > 0.8
    assert quality.perplexity_ratio == pytest.approx(1, abs=0.1)
    assert reply.tokens_match == ("true" if quality.matching_tokens == case.n_gen else "false")


def test_the_cache_that_was_judged_is_gone_when_the_peak_begins(tmp_path: Path) -> None:
    held = []

    class Device(type(loaded(tiny_case()).device)):  # type: ignore[misc]
        def reset_peak_memory(self) -> bool:
            held.append(hasattr(worker.strategy, "kv"))
            return bool(super().reset_peak_memory())

    case = tiny_case("fp8")
    worker, path, text = loaded(case), str(tmp_path / "reference.safetensors"), str(tmp_path / "text.safetensors")
    worker.device = Device()
    worker.answer(MakeReference(case=case, path=path))
    worker.answer(MakeText(case=case, path=text, n_context=8))
    for _ in range(2):
        worker.answer(Judge(case=case, path=path, text=text, n_threads=1))
        assert isinstance(worker.answer(CheckCase(case=case, path=path)), Checked)
    assert held == [False, False]


def test_a_strategy_that_evicts_shows_it_in_the_recall(tmp_path: Path) -> None:
    quality = judged(tiny_case("sink-window", n_prompt=300), tmp_path).quality
    assert quality is not None
    assert quality.logit_kl > 1e-4
    assert quality.recall_agreement is not None


def test_an_exact_strategy_needs_no_quality(tmp_path: Path) -> None:
    reply = judged(tiny_case("static"), tmp_path)
    assert reply.exact
    assert reply.quality is None


def test_a_text_that_is_no_measure_judges_nothing_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "_is_prefix_stable", lambda *_: False)
    reply = judged(tiny_case("fp8"), tmp_path)
    assert reply.quality is None
    assert reply.depends_on_later


@pytest.mark.parametrize("error", [Unsupported("feeds experts at most 8 sequences"), RuntimeError("compiling failed")])
def test_a_text_is_written_by_dynamic_where_the_fastest_fails(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(Dynamic):
        def prepare(self, *_: Any, **__: Any) -> None:
            raise error

    honest = references.build
    monkeypatch.setattr(
        references, "build", lambda name, model: Failing(model) if name == "compiled" else honest(name, model)
    )
    case = tiny_case("fp8")
    request = MakeText(case=case, path=str(tmp_path / "text"), writer="compiled", n_context=8)
    made = loaded(case).answer(request)
    assert isinstance(made, TextMade), made
    assert made.writer == "dynamic"


def test_a_workers_own_cache_says_what_it_promises() -> None:
    promises = {}
    for strategy in ("cache:tests.unfit_caches:promised", "cache:tests.unfit_caches:growing", "fp8", "dynamic"):
        case = tiny_case(strategy)
        reply = Worker().answer(Load(group=case.group, strategy=case.strategy, naive_logits=case.naive_logits, seed=0))
        assert isinstance(reply, Loaded)
        promises[strategy.rpartition(":")[2]] = reply.exact
    assert promises == {"promised": True, "growing": False, "fp8": False, "dynamic": True}


def test_a_users_cache_that_promises_to_be_exact_and_is_not_fails(tmp_path: Path) -> None:
    _, reply = checked(tiny_case("cache:tests.unfit_caches:only_promised"), tmp_path)
    assert isinstance(reply, Refused)
    assert (reply.status, reply.tokens_match) == ("failed", "false")
    assert reply.error.startswith(
        "cache:tests.unfit_caches:only_promised promises to be exact, and its logits differ from the parallel "
        "forward's by "
    )


def test_bytes_allocated_hold_padding_and_grow(tmp_path: Path) -> None:
    def allocated(strategy: str) -> tuple[int | None, int | None, int, int]:
        _, reply = checked(tiny_case(strategy, n_depth=3), tmp_path)
        assert isinstance(reply, Checked)
        held = reply.kv_bytes_allocated_after_prefill, reply.kv_bytes_allocated_after_decode
        return *held, reply.kv_bytes_after_prefill, reply.kv_bytes_after_decode

    assert allocated("naive") == (0, 0, 0, 0)
    before, after, used_before, used_after = allocated("dynamic")
    assert (before, after) == (used_before, used_after)
    before, after, used_before, used_after = allocated("static")
    assert before == after
    assert before is not None
    assert used_before < used_after < before


@pytest.mark.parametrize("strategy", ["dynamic", "fp8", "sink-window"])
def test_bytes_held_are_those_planned(strategy: str, tmp_path: Path) -> None:
    lengths = {"n_prompt": (270,), "n_gen": (5,), "n_depth": (3,)}
    (planned,) = plan([Sweep(models=("random:tiny",), strategies=(strategy,), n_threads=(1,), **lengths)])
    _, reply = checked(planned.case, tmp_path)
    assert isinstance(reply, Checked)
    assert planned.prefill is not None
    assert planned.decode is not None
    assert planned.prefill.kv_bytes == reply.kv_bytes_after_prefill
    assert planned.decode.kv_bytes == reply.kv_bytes_after_decode


def test_a_lossy_kind_reads_what_it_stores() -> None:
    def decode(strategy: str) -> Costs:
        lengths = {"n_prompt": (500,), "n_gen": (2,), "n_depth": (0,)}
        (planned,) = plan([Sweep(models=("random:tiny",), strategies=(strategy,), n_threads=(1,), **lengths)])
        assert planned.decode is not None
        return planned.decode

    whole = decode("dynamic")
    weights = whole.bytes - whole.kv_bytes  # and logits: the one step reads or writes every row
    for strategy in ("fp8", "compiled-int8", "compiled-int4", "quanto-int4", "hqq-int4", "sink-window"):
        lossy = decode(strategy)
        assert lossy.bytes - lossy.kv_bytes == weights
        assert lossy.kv_bytes < 0.6 * whole.kv_bytes
        assert (lossy.flops < whole.flops) == (strategy == "sink-window")


@pytest.mark.parametrize("strategy", ["dynamic", "static", "fp8", "sink-window"])
def test_bytes_allocated_are_those_planned(strategy: str, tmp_path: Path) -> None:
    lengths = {"n_prompt": (8,), "n_gen": (5,), "n_depth": (3,)}
    (planned,) = plan([Sweep(models=("random:tiny",), strategies=(strategy,), n_threads=(1,), **lengths)])
    _, reply = checked(planned.case, tmp_path)
    assert isinstance(reply, Checked)
    assert planned.kv_bytes_allocated == {
        "prefill": pytest.approx(reply.kv_bytes_allocated_after_prefill, rel=0.01),
        "decode": pytest.approx(reply.kv_bytes_allocated_after_decode, rel=0.01),
    }


def test_lossy_tokens_may_change_and_infinite_logits_may_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvcache.strategies.cached import Cached

    case = tiny_case("fp8", n_gen=8)
    honest = Cached.decode
    monkeypatch.setattr(Cached, "decode", lambda self, ids: -honest(self, ids))
    reply = judged(case, tmp_path)
    assert (reply.tokens_match, reply.quality is not None) == ("false", True)
    assert reply.quality is not None
    assert reply.quality.matching_tokens == 1
    assert reply.quality.top1_agreement <= reply.quality.commonest_share
    monkeypatch.setattr(Cached, "decode", lambda self, ids: honest(self, ids) * torch.inf)
    refused = loaded(case).answer(
        Judge(
            case=case,
            path=str(tmp_path / "reference.safetensors"),
            text=str(tmp_path / "text.safetensors"),
            n_threads=1,
        )
    )
    assert isinstance(refused, Refused)
    assert refused.error.startswith("NonFiniteLogits")


def test_a_lossy_cache_whose_reset_is_broken_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, reply = checked(tiny_case("fp8", n_gen=8), tmp_path)
    assert isinstance(reply, Checked)
    monkeypatch.setattr(Cached, "reset", lambda _: None)
    other = (worker.prompt + 1) % 97
    worker.strategy.prefill(other)
    answer = worker.answer(TakeTurn())
    assert isinstance(answer, Refused)
    assert answer.status == "failed"
    assert answer.error == (
        "fp8 emitted other tokens in a timed turn than when it was checked: what an earlier round left is not put "
        "back, or it does not repeat itself"
    )


_OTHER_TOKENS = (
    "cache:tests.unfit_caches:by_own_chance emitted other tokens in a timed turn than when it was checked: what an "
    "earlier round left is not put back, or it does not repeat itself"
)


@pytest.mark.parametrize("n_depth", [0, 6])
def test_a_cache_that_works_by_chance_repeats_itself_unless_its_chances_are_its_own(
    n_depth: int, tmp_path: Path
) -> None:
    """The same case again has the same tokens, and the same quality, whatever was drawn between."""
    case = tiny_case("cache:tests.unfit_caches:by_chance", n_gen=8, n_depth=n_depth)
    qualities = []
    for _ in range(2):
        worker, path, text = loaded(case), str(tmp_path / "reference.safetensors"), str(tmp_path / "text.safetensors")
        worker.answer(MakeReference(case=case, path=path))
        worker.answer(MakeText(case=case, path=text, n_context=n_depth + case.n_prompt))
        torch.rand(3)
        worker.answer(Judge(case=case, path=path, text=text, n_threads=1))
        reply = worker.answer(CheckCase(case=case, path=path))
        assert isinstance(reply, Checked), reply
        assert (reply.tokens_match, reply.quality is not None) == ("false", True)
        qualities.append(reply.quality)
        for _ in range(3):
            taken = worker.answer(TakeTurn())
            assert isinstance(taken, TurnTaken), taken
    assert qualities[0] == qualities[1]
    worker, _ = checked(tiny_case("cache:tests.unfit_caches:by_own_chance", n_gen=8, n_depth=n_depth), tmp_path)
    refused = worker.answer(TakeTurn())
    assert isinstance(refused, Refused)
    assert (refused.status, refused.error) == ("failed", _OTHER_TOKENS)


def test_a_turn_without_a_time_is_refused_when_it_is_measured(tmp_path: Path) -> None:
    worker, _ = checked(tiny_case(), tmp_path)
    worker.clock.stop = lambda: Times(host_ns=[5, 0, 3], event_ns=None)  # type: ignore[method-assign]
    answer = worker.answer(TakeTurn())
    assert isinstance(answer, Refused)
    assert "too coarse" in answer.error


def test_wrong_tokens_in_a_timed_turn_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, _ = checked(tiny_case(), tmp_path)
    honest = Dynamic.decode
    monkeypatch.setattr(Dynamic, "decode", lambda self, ids: -honest(self, ids))
    reply = worker.answer(TakeTurn())
    assert isinstance(reply, Refused)
    assert (reply.status, reply.tokens_match) == ("failed", "false")


_NO_MEMORY = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (Unsupported("no such luck"), "unsupported", "no such luck"),
        (MemoryError(), "oom", "MemoryError: no message"),
        (RuntimeError(_NO_MEMORY), "oom", f"RuntimeError: {_NO_MEMORY}"),
        (RuntimeError("first\nsecond"), "failed", "RuntimeError: first"),
        (UnfitCache("my:make returned None"), "failed", "my:make returned None"),
        (ModelError("my:make raised KeyError"), "failed", "my:make raised KeyError"),
    ],
)
def test_an_error_is_an_answer(
    error: Exception, status: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, _ = checked(tiny_case(), tmp_path)

    def broken(self: Dynamic, ids: Tensor) -> Tensor:
        raise error

    monkeypatch.setattr(Dynamic, "decode", broken)
    reply = worker.answer(TakeTurn())
    assert isinstance(reply, Refused)
    assert (reply.status, reply.error) == (status, text)


def test_out_of_memory_is_told_from_other_errors() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))


def test_serve_answers_line_by_line() -> None:
    case = tiny_case()
    load = Load(group=case.group, strategy="dynamic", naive_logits="last", seed=0)
    bad = msgspec.structs.replace(load, group=msgspec.structs.replace(case.group, model="random:nothing"))
    first, second = answers(bad, load)
    assert isinstance(first, Refused)
    assert isinstance(second, Loaded)


def answers(*requests: Request) -> list[Reply]:
    """What `serve` says to these lines."""
    replies = io.BytesIO()
    serve(io.BytesIO(b"".join(msgspec.json.encode(request) + b"\n" for request in requests)), replies)
    return [msgspec.json.decode(line, type=Reply) for line in replies.getvalue().splitlines()]


def test_a_worker_whose_cuda_context_is_lost_says_that_it_ends_and_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access")

    monkeypatch.setattr(Worker, "_carry_out", lose)
    error = "AcceleratorError: CUDA error: an illegal memory access"
    assert answers(TakeTurn(), TakeTurn()) == [Refused(status="failed", error=error, ends=True)]


def until_checked(case: Case, folder: Path) -> list[Request]:
    path = str(folder / "reference.safetensors")
    load = Load(group=case.group, strategy=case.strategy, naive_logits=case.naive_logits, seed=0)
    return [load, MakeReference(case=case, path=path), CheckCase(case=case, path=path)]


@pytest.mark.parametrize("strategy", ["naive", "dynamic"])
def test_a_turn_in_lockstep_pauses_after_every_token(strategy: str, tmp_path: Path) -> None:
    case = tiny_case(strategy)
    told = answers(*until_checked(case, tmp_path), TakeTurn(lockstep=True), *[GoOn()] * case.n_gen, TakeTurn())
    *pauses, taken, whole = told[3:]
    assert pauses == [Paused()] * case.n_gen
    assert isinstance(taken, TurnTaken)
    assert isinstance(whole, TurnTaken)
    assert taken.steps == whole.steps
    assert len(taken.step_ns) == len(taken.steps)
    assert min([taken.prefill_ns, *taken.step_ns]) > 0


def test_a_check_counts_operations_unless_told_not_to(tmp_path: Path) -> None:
    *requests, check = until_checked(tiny_case(), tmp_path)
    *_, counted, plain = answers(*requests, check, msgspec.structs.replace(check, count=False))
    assert isinstance(counted, Checked)
    assert isinstance(plain, Checked)
    assert counted.counters
    not_counted = ("counters", "peak_memory_bytes", "peak_beyond_weights_bytes", "growth_bytes")
    assert plain == msgspec.structs.replace(counted, **dict.fromkeys(not_counted))


def test_a_worker_whose_driver_is_gone_in_a_pause_ends(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        answers(*until_checked(tiny_case(), tmp_path), TakeTurn(lockstep=True))


def test_only_going_on_answers_a_pause(tmp_path: Path) -> None:
    *_, paused, refused, whole = answers(
        *until_checked(tiny_case(), tmp_path), *[TakeTurn(lockstep=True), TakeTurn()] * 2
    )[:6]
    assert paused == Paused()
    assert refused == Refused(status="failed", error="TypeError: TakeTurn is no answer to Paused")
    assert whole == Paused()  # the worker lives on


def test_a_worker_without_a_driver_does_not_pause(tmp_path: Path) -> None:
    worker, _ = checked(tiny_case(), tmp_path)
    reply = worker.answer(TakeTurn(lockstep=True))
    assert isinstance(reply, Refused)
    assert reply.status == "unsupported"


def test_going_on_with_no_turn_is_refused() -> None:
    assert answers(GoOn()) == [Refused(status="failed", error="no turn is paused")]


def test_a_budget_has_fewer_positions_timed(tmp_path: Path) -> None:
    load, reference, check = until_checked(tiny_case("naive", n_gen=12), tmp_path)
    reduced = msgspec.structs.replace(check, tokens_per_turn=1)
    _, few, _, whole = answers(load, reference, reduced, TakeTurn(), check, TakeTurn())[2:]
    assert isinstance(few, TurnTaken)
    assert isinstance(whole, TurnTaken)
    assert (len(few.steps), len(whole.steps)) == (1, 11)


def of_model(model: PreTrainedModel, strategy: Strategy, folder: Path) -> tuple[Reply, Reply]:
    """The replies about the reference and the check of a worker that holds `model` and `strategy`."""
    case = tiny_case(strategy.name, n_prompt=6, n_gen=6)
    worker, path = loaded(case), str(folder / "reference.safetensors")
    worker.model, worker.strategy, worker.vocab_size = model, strategy, VOCAB_SIZE
    return worker.answer(MakeReference(case=case, path=path)), worker.answer(CheckCase(case=case, path=path))


def test_where_positions_depend_on_later_ones_a_cache_gives_other_tokens(tmp_path: Path) -> None:
    model = seeing_the_future()[0]
    made, naive = of_model(model, Naive(model), tmp_path)
    assert made == Done()
    assert isinstance(naive, Checked)
    assert (naive.tokens_match, naive.depends_on_later) == ("true", True)
    _, cached = of_model(model, Dynamic(model), tmp_path)
    assert isinstance(cached, Checked)
    assert (cached.tokens_match, cached.depends_on_later) == ("false", True)


def test_without_a_cache_such_a_model_gives_other_tokens_too(tmp_path: Path) -> None:
    _, reply = of_model(family("xlnet"), Dynamic(family("xlnet")), tmp_path)
    assert isinstance(reply, Refused)
    assert (reply.status, reply.tokens_match) == ("failed", "false")
    assert reply.error.endswith("and earlier positions of this model depend on later ones")


def test_rounding_makes_no_other_tokens_of_a_model_without_a_cache(tmp_path: Path) -> None:
    model = tiny("minimax", CONFIGS["minimax"], dtype=torch.bfloat16)
    _, reply = of_model(model, Dynamic(model), tmp_path)
    assert isinstance(reply, Refused)
    assert (reply.status, reply.tokens_match) == ("unsupported", None)


def test_a_forward_that_fails_in_transformers_is_refused_as_the_models(tmp_path: Path) -> None:
    model = tiny("xlstm", CONFIGS["xlstm"], dtype=torch.bfloat16)
    made, _ = of_model(model, Naive(model), tmp_path)
    assert isinstance(made, Refused)
    assert (made.status, made.of_model) == ("unsupported", True)
    assert "its weights are bfloat16: take float32" in made.error


def test_a_users_own_model_code_that_fails_is_a_failure_and_no_bad_input(tmp_path: Path) -> None:
    model = tiny("llama", llama_like())
    model.model.layers[1].mlp.forward = lambda hidden: hidden[..., :3]
    made, _ = of_model(model, Naive(model), tmp_path)
    assert isinstance(made, Refused)
    assert (made.status, made.of_model) == ("failed", False)


def test_a_reference_that_is_unsupported_for_another_reason_says_nothing_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.worker.make_reference", Mock(side_effect=Unsupported("no such luck")))
    made, _ = of_model(family("rwkv"), Naive(family("rwkv")), tmp_path)
    assert made == Refused(status="unsupported", error="no such luck")


def test_a_cache_of_ours_that_returns_a_wrong_shape_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = SinkWindowLayer.update

    def one_head(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
        keys, values = whole(*arguments, **named)
        return keys[:, :1], values[..., :3]

    monkeypatch.setattr(SinkWindowLayer, "update", one_head)
    worker, _ = checked(tiny_case("sink-window"), tmp_path)
    path = str(tmp_path / "reference.safetensors")
    reply = worker.answer(CheckCase(case=tiny_case("sink-window"), path=path, count=False))  # counting is our code
    assert isinstance(reply, Refused)
    assert (reply.status, "shapes" in reply.error) == ("failed", True)


def test_rounding_is_stored_with_whose_logits_they_are(tmp_path: Path) -> None:
    model = rounding_by_length()
    made, naive = of_model(model, Naive(model), tmp_path)
    assert made == Done()
    assert isinstance(naive, Checked)
    assert (naive.tokens_match, naive.reference_by_naive, naive.depends_on_later) == ("true", True, False)
    assert naive.reference_rounding > tolerance(model)


def test_a_model_that_swallows_its_cache_is_unsupported(tmp_path: Path) -> None:
    _, reply = of_model(family("rwkv"), Dynamic(family("rwkv")), tmp_path)
    assert reply == Refused(
        status="unsupported", error="rwkv takes no past_key_values: a step would see its own token alone"
    )


def test_a_model_that_does_not_repeat_itself_is_refused_as_such(tmp_path: Path) -> None:
    model = unrepeatable()
    made, _ = of_model(model, Naive(model), tmp_path)
    assert isinstance(made, Refused)
    assert made.of_model
    assert "other logits when it is fed the same tokens again" in made.error
