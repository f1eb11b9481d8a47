"""Which kernel computes a product: the candidates agree, the fastest is chosen, stored once, and can be pinned."""

import errno
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import config
from torch.nn import functional

from kvcache.caches.contract import Unsupported
from kvcache.compiled import candidates, choice, choices_file, products
from kvcache.compiled.architectures.catalogue import describe
from kvcache.compiled.choice import Choice, Products
from kvcache.compiled.products import Linear
from kvcache.compiled.strategy import Compiled
from kvcache.proof.tokens import agreement, reference
from kvcache.strategies.tolerance import TOLERANCE
from tests.compiled.families import family
from tests.tiny import ARCHITECTURES, token_ids


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path))
    return tmp_path


def test_other_candidates_are_another_version_of_the_file() -> None:
    """A machine that has chosen looks again only then: raise `VERSION` with these lists."""
    sums = ["sum-1", "sum-2", "sum-4"]
    prompt = ["onednn", "linear", "weight-first"]
    assert choices_file.VERSION == 4
    assert candidates.PROMPT_ROWS == (128, 512)
    assert list(candidates.STEP) == [*sums, "linear", "weight-first"]
    assert list(candidates.PROMPT) == [*prompt, *(name + candidates.WIDE for name in prompt)]


def test_one_table_of_names_and_functions() -> None:
    assert list(products.STEP) == list(candidates.STEP)
    assert list(products.PROMPT) == list(candidates.PROMPT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", [*products.STEP.items(), *products.PROMPT.items()], ids=lambda item: item[0])
def test_every_candidate_computes_the_product(kernel: tuple[str, products.Product], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 20), (12, 20), (12,)]
    x, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    try:
        found = kernel[1](x, weight, bias)
    except RuntimeError:
        assert "onednn" in kernel[0] or "weight-first" in kernel[0]  # this processor has no such product of bfloat16
        assert dtype == torch.bfloat16
        assert not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return
    assert (found.dtype, found.shape) == (dtype, (2, 3, 12))
    expected = functional.linear(x.double(), weight.double(), bias.double())
    assert float((found.double() - expected).abs().max() / expected.abs().max()) < TOLERANCE[dtype]


def test_a_product_that_nothing_was_chosen_for_is_computed_on_any_processor() -> None:
    weight = torch.eye(8, dtype=torch.bfloat16)
    assert torch.equal(products.product(torch.ones(1, 3, 8, dtype=torch.bfloat16), Linear(weight)), torch.ones(1, 3, 8))


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("prompt", ["onednn", "linear", "weight-first"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "phi3", "mixtral"])
def test_a_model_by_any_candidate_for_its_prompt_emits_the_same_tokens(name: str, prompt: str) -> None:
    model, ids = family(name), token_ids(2, 2, 20)
    names = choice.products(describe(model), 2)
    strategy = Compiled(model, backend="eager", kernels={product: prompt for product in names if "prompt" in product})
    strategy.prepare(2, 24)
    assert {kernel for product, kernel in (strategy.kernels or {}).items() if "prompt" in product} == {prompt}
    assert agreement(strategy, ids, reference(model, ids, 4)).tokens_match == "true"


@pytest.mark.parametrize("step", [name for name in candidates.STEP if name != "sum-2"])
def test_a_model_by_any_candidate_for_its_step_emits_the_same_tokens(step: str) -> None:
    """Traced by torch.compile, if not compiled: a step takes its kernel then."""
    model, ids = ARCHITECTURES["llama"](), token_ids(2, 3, 20)
    names = choice.products(describe(model), 3)
    strategy = Compiled(model, backend="eager", kernels={product: step for product in names if "step" in product})
    strategy.prepare(3, 24)
    assert agreement(strategy, ids, reference(model, ids, 4)).tokens_match == "true"


def test_the_products_of_a_model() -> None:
    found = choice.products(describe(ARCHITECTURES["llama"]()), 4)
    assert {name: (own.default, len(own.parts)) for name, own in found.items()} == {
        "32x32 float32, step of 4": ("sum-2", 4),
        "32x32 float32, prompt of 128": ("onednn", 4),
        "32x32 float32, prompt of 512": ("onednn", 4),
        "16x32 float32, step of 4": ("sum-2", 4),
        "16x32 float32, prompt of 128": ("onednn", 4),
        "16x32 float32, prompt of 512": ("onednn", 4),
        "64x32 float32, step of 4": ("sum-2", 4),
        "32x64 float32, step of 4": ("sum-2", 2),
        "mlp gated 64x32 float32, prompt of 128": ("weight-first", 2),
        "mlp gated 64x32 float32, prompt of 512": ("weight-first", 2),
        "97x32 float32, step of 4": ("sum-1", 1),  # 97 is odd
    }


def test_more_rows_have_another_default() -> None:
    model = describe(ARCHITECTURES["llama"]())
    defaults = {
        rows: {own.default for name, own in choice.products(model, rows).items() if "step" in name}
        for rows in (products.FEW_ROWS, products.FEW_ROWS + 1)
    }
    assert defaults == {products.FEW_ROWS: {"sum-1", "sum-2"}, products.FEW_ROWS + 1: {"linear"}}


@pytest.mark.parametrize(
    ("other", "chosen"),
    [
        ([1.0, 1.0, 1.0], "a"),
        ([0.96, 0.96, 0.96], "a"),  # faster, but within what noise does
        ([0.5, 1.1, 1.2], "a"),  # one lucky pass
        ([0.94, 0.94, 5.0], "b"),  # one unlucky pass
        ([0.9, 0.9, 0.9], "b"),
    ],
)
def test_another_candidate_needs_a_clear_gain(other: list[float], chosen: str) -> None:
    assert choice.fastest({"a": [1.0, 1.0, 1.0], "b": other}, "a") == chosen


def test_a_look_at_a_models_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """All candidates of all products are timed; sums are compiled for each shape, and once with hardly a weight."""
    compiled: list[products.Product] = []

    def note(function: products.Product) -> products.Product:
        compiled.append(function)
        return function

    monkeypatch.setattr(choice, "compiled", note)
    monkeypatch.setattr(choice, "HOPELESS", math.inf)  # of so small products some are
    found = choice.choose(choice.products(describe(ARCHITECTURES["llama"]()), 4), 4)
    assert len(compiled) == 4 * len(products.SUMS) + 1 + 1
    assert set(found["64x32 float32, step of 4"][1]) == set(candidates.STEP)
    assert set(found["97x32 float32, step of 4"][1]) == set(candidates.STEP) - {"sum-2", "sum-4"}
    assert set(found["mlp gated 64x32 float32, prompt of 512"][1]) == {"onednn", "linear", "weight-first"}
    for kernel, times in found.values():
        assert kernel in times
        assert len({len(own) for own in times.values()}) == 1


@pytest.mark.parametrize(
    ("rows", "sums", "of_odd"),
    [
        (1, {"sum-2", "sum-4"}, {"sum-1"}),
        (8, {"sum-1", "sum-2"}, {"sum-1"}),
        (16, {"sum-1"}, {"sum-1"}),
        (17, set(), set()),
    ],
)
def test_sums_are_candidates_for_few_rows(
    rows: int, sums: set[str], of_odd: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default is one whatever its rows: a head of odd size is read at one place."""
    monkeypatch.setattr(choice, "compiled", lambda function: function)
    monkeypatch.setattr(choice, "EMPTY_CALLS", 1)
    found = choice.products(describe(ARCHITECTURES["llama"]()), rows)
    passes = choice.step_passes({name: own for name, own in found.items() if "step" in name}, rows, math.inf)
    assert set(passes[f"32x32 float32, step of {rows}"]) == sums | {"linear", "weight-first"}
    assert set(passes[f"97x32 float32, step of {rows}"]) == of_odd | {"linear", "weight-first"}


class Clock:
    """A clock that only what is timed, or compiled, moves on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, compile_s: float = 0.0, pass_s: Callable[[Any], float]):
        self.now = 1000.0
        clock = SimpleNamespace(monotonic=lambda: self.now, perf_counter=lambda: self.now)
        monkeypatch.setattr(choice, "time", clock)
        monkeypatch.setattr(choice, "EMPTY_CALLS", 1)
        monkeypatch.setattr(choice, "compiled", lambda function: self._moved(compile_s, function))
        monkeypatch.setattr(choice, "_seconds", lambda calls: self._moved(taken := pass_s(calls[0]), taken))

    def _moved(self, seconds: float, result: Any) -> Any:
        self.now += seconds
        return result


def seconds_of(call: Any, *, step_s: float, prompt_s: float) -> float:
    """What a pass takes: those of a prompt call `over_prompt`, and that with hardly a weight takes no time."""
    if getattr(call.func, "__name__", "") == "over_prompt":
        return prompt_s
    return 0.0 if call.args[1].shape == (16, 16) else step_s


def defaults(found: dict[str, Products], chosen: dict[str, tuple[str, choice.Times]]) -> set[str]:
    """The products that were not timed, each of which has kept its default."""
    untimed = {name for name, (_, times) in chosen.items() if not times}
    assert all(chosen[name][0] == found[name].default for name in untimed)
    return untimed


@pytest.mark.parametrize(
    ("compile_s", "step_s", "prompt_s", "kept"),
    [
        (0.0, 0.01, 0.01, ""),
        (6.0, 0.01, 0.01, "most of step"),
        (0.0, 0.9, 0.01, "step"),
        (0.0, 0.01, 2.0, "prompt"),
        (0.0, 40.0, 0.01, "all"),
        (50.0, 0.01, 0.01, "all"),
    ],
)
def test_a_choice_ends_in_time(
    compile_s: float, step_s: float, prompt_s: float, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has not been compiled, or timed often enough, keeps its default; other products are chosen all the same."""
    taken = functools.partial(seconds_of, step_s=step_s, prompt_s=prompt_s)
    clock = Clock(monkeypatch, compile_s=compile_s, pass_s=taken)
    found = choice.products(describe(ARCHITECTURES["llama"]()), 1)
    start = clock.now
    untimed = defaults(found, choice.choose(found, 1))
    assert clock.now - start <= choice.SECONDS + max(compile_s, step_s, prompt_s)
    step, prompt = ({name for name in found if word in name} for word in ("step", "prompt"))
    if kept == "most of step":
        assert untimed < step
        assert (
            len(step - untimed) == 1
        )  # its two sums, and the one that shows what a call takes, are three compilations
    else:
        assert untimed == {"": set(), "step": step, "prompt": prompt, "all": step | prompt}[kept]


def test_only_whole_rounds_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of one index were taken one after the other, also where time was up in the middle of a round."""
    clock = Clock(monkeypatch, pass_s=lambda call: call())
    seconds = {"good": 0.5, "other": 0.25}
    passes = {
        name: {kernel: choice.Pass([functools.partial(float, taken)]) for kernel, taken in seconds.items()}
        for name in "xy"
    }
    found = {name: Products("good", [Linear(torch.zeros(1, 1))]) for name in passes}
    lengths = {}
    for end in (1.0, 5.0, 7.0, 100.0):  # a round takes 1.5 s, and the first warms up
        times = choice.interleaved(passes, found, clock.now + end)
        lengths[end] = {len(taken) for own in times.values() for taken in own.values()}
    assert lengths == {1.0: set(), 5.0: set(), 7.0: {3}, 100.0: {6}}  # the last by ROUNDS_SECONDS


def test_a_candidate_that_does_not_run_or_is_hopeless_is_left_out() -> None:
    class Fixed(choice.Pass):
        def seconds(self) -> float:
            return self.call_s

    def broken() -> None:
        raise RuntimeError("could not create a primitive descriptor")

    passes = {
        "x": {
            "good": Fixed([], 1.0),
            "broken": choice.Pass([broken]),
            "slow": Fixed([], 1.01 * choice.HOPELESS),
            "slower": Fixed([], 0.99 * choice.HOPELESS),
        }
    }
    found = {"x": Products("good", [Linear(torch.zeros(1, 1))])}
    assert list(choice.interleaved(passes, found, math.inf)["x"]) == ["good", "slower"]


def test_small_weights_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        pytest.fail("timed")

    monkeypatch.setattr(choices_file, "completed", fail)
    model, kernels = Choice(describe(ARCHITECTURES["llama"]())).of_batch(1)
    assert set(kernels.values()) == {"sum-1", "sum-2", "onednn", "weight-first"}
    assert model.layers[0].o.step == "sum-2"


def test_large_weights_are_timed_once_and_by_batch(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[set[str]] = []

    def choose(found: dict[str, Products], rows: int) -> dict[str, Any]:
        looks.append(set(found))
        return {name: ("sum-4" if "step" in name else "linear", {"sum-4": [1e-6]}) for name in found}

    monkeypatch.setattr(choice, "LEAST_BYTES", 1)
    monkeypatch.setattr(choice, "choose", choose)
    described = describe(ARCHITECTURES["llama"]())
    for own in (Choice(described), Choice(described)):
        for rows in (1, 1, 2):
            model, kernels = own.of_batch(rows)
            assert set(kernels.values()) == {"sum-4", "linear"}
            assert (model.head.linear.step, model.layers[1].mlp.up.prompt) == ("sum-4", ("linear",) * 2)  # type: ignore[union-attr]
    assert [len(look) for look in looks] == [11, 5]  # the prompts' six are known when another batch size comes
    (file,) = cache.glob("kernels-*.json")
    assert candidates.read(file) == dict.fromkeys(looks[0] | looks[1]) | {
        name: "sum-4" if "step" in name else "linear" for name in looks[0] | looks[1]
    }


@pytest.mark.parametrize(("of_blocks", "used"), [("weight-first", "onednn"), ("linear", "linear")])
def test_a_prompt_is_computed_by_one_library(of_blocks: str, used: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def completed(wanted: dict[str, Products], _choose: object) -> dict[str, str]:
        return {name: of_blocks if "mlp" in name else "linear" for name in wanted}

    monkeypatch.setattr(choice, "LEAST_BYTES", 1)
    monkeypatch.setattr(choices_file, "completed", completed)
    _, kernels = Choice(describe(ARCHITECTURES["llama"]())).of_batch(1)
    assert kernels["mlp gated 64x32 float32, prompt of 128"] == of_blocks
    assert kernels["32x32 float32, prompt of 128"] == used
    assert kernels["32x32 float32, step of 1"] == "linear"


@pytest.mark.parametrize(
    ("of_blocks", "chosen"),
    [
        ({"weight-first": 8.0, "linear": 9.5}, {"x": "onednn", "mlp": "weight-first"}),  # 14 and 13.5: no clear gain
        ({"weight-first": 8.0, "linear": 7.0}, {"x": "linear", "mlp": "linear"}),
        ({}, {}),  # those of a prompt are known
        ({"weight-first": 8.0}, {"x": "onednn", "mlp": "weight-first"}),  # torch's was hopeless
    ],
)
def test_the_library_of_a_prompt_is_that_of_the_least_time_in_all(
    of_blocks: dict[str, float], chosen: dict[str, str]
) -> None:
    weight = torch.zeros(1, 1)
    prompt = {"x": Products("onednn", [Linear(weight)] * 2), "mlp": Products("weight-first", [Linear(weight)])}
    prompt = prompt if of_blocks else {}
    seconds = {"x": {"onednn": 3.0, "linear": 2.0}, "mlp": of_blocks}
    times = {name: {kernel: [taken] * 3 for kernel, taken in own.items()} for name, own in seconds.items()}
    assert choice.of_one_library(prompt, times) == chosen


def test_each_number_of_rows_takes_the_nearest_kernel() -> None:
    """By ratio: between 128 and 512 the border is 256."""
    assert [products.nearest(rows) for rows in (2, 128, 256, 257, 512, 100_000)] == [0, 0, 0, 1, 1, 1]


def test_a_prompt_takes_the_kernel_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def note(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        taken.append(x.shape[0] * x.shape[1])
        return functional.linear(x, weight, bias)

    monkeypatch.setitem(products.PROMPT, "linear", note)
    linear = Linear(torch.eye(4), prompt=("onednn", "linear"))
    for batch_size, q in ((1, 2), (2, 128), (2, 129), (1, 512)):
        products.product(torch.ones(batch_size, q, 4), linear)
    assert taken == [258, 512]


@pytest.mark.parametrize("library", ["linear", "onednn"])
def test_a_product_too_small_to_be_timed_follows_the_others(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "LEAST_BYTES", 10_000)
    monkeypatch.setattr(choices_file, "completed", lambda wanted, _: dict.fromkeys(wanted, library))
    _, kernels = Choice(describe(ARCHITECTURES["llama"]())).of_batch(1)
    assert kernels["32x32 float32, prompt of 512"] == library
    assert kernels["16x32 float32, prompt of 512"] == library
    assert kernels["16x32 float32, step of 1"] == "sum-2"


def stored(names: list[str]) -> dict[str, str]:
    """What the cache folder's file says of these products; those that it lacks are `sum-1`."""
    return choices_file.completed(
        dict.fromkeys(names), lambda missing: {name: ("sum-1", {"sum-1": [2e-6]}) for name in missing}
    )


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("sum-1", "sum-99"),
        lambda text: text.replace(f'"version": {choices_file.VERSION}', '"version": 0'),
        lambda _: "[]",
    ],
)
def test_a_damaged_file_is_made_again(cache: Path, damage: Callable[[str], str]) -> None:
    name = "4x4 float32, step of 1"
    assert stored([name]) == {name: "sum-1"}
    (file,) = cache.glob("kernels-*.json")
    whole = file.read_text()
    file.write_text(damage(whole))
    assert stored([name]) == {name: "sum-1"}
    assert file.read_text() == whole
    assert not list(cache.glob(f".{file.name}.*"))
    assert json.loads(whole)["microseconds"] == {name: {"sum-1": 2.0}}


def test_without_a_cache_folder_the_choice_is_for_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path / "file" / "cache"))
    assert stored(["a"]) == {"a": "sum-1"}
    assert "not stored" in capsys.readouterr().err


def test_a_choice_that_cannot_be_written_is_made_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    looks: list[set[str]] = []

    def choose(missing: dict[str, None]) -> dict[str, Any]:
        looks.append(set(missing))
        return {name: ("sum-1", {"sum-1": [2e-6]}) for name in missing}

    monkeypatch.setattr(choices_file.os, "fsync", full)
    assert choices_file.completed({"a": None}, choose) == {"a": "sum-1"}
    assert looks == [{"a"}]
    assert "not stored ([Errno 28] No space left on device)" in capsys.readouterr().err
    assert not [path for path in cache.iterdir() if path.suffix != ".lock"]


def test_products_that_no_time_was_left_for_are_said_once(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def choose(missing: dict[str, None]) -> dict[str, Any]:
        return {name: ("sum-1", {"sum-1": [2e-6]} if name == "a" else {}) for name in missing}

    for _ in range(2):
        assert choices_file.completed({"a": None, "b": None}, choose) == {"a": "sum-1", "b": "sum-1"}
    assert capsys.readouterr().err.count("no time was left for 1 of them") == 1
    (file,) = cache.glob("kernels-*.json")
    assert json.loads(file.read_text())["microseconds"] == {"a": {"sum-1": 2.0}, "b": {}}


def test_another_compiler_has_a_file_of_its_own(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum is as fast as the compiler makes it."""
    name = "4x4 float32, step of 1"
    stored([name])
    with config.patch({"cpp.march": "native -mmove-max=256"}):
        stored([name])
    program = cache / "other g++"
    program.write_text("#!/bin/sh\necho 'g++ (stub) 99'\n")
    program.chmod(0o755)
    monkeypatch.setenv("CXX", str(program))
    stored([name])
    stored([name])
    facts = [json.loads(path.read_text())["compiler"] for path in cache.glob("kernels-*.json")]
    assert len(facts) == 3
    assert any(f"'{program}': g++ (stub) 99; -march=native" in fact for fact in facts)
    assert any("-march=native -mmove-max=256" in fact for fact in facts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON document"),
        ("[]", 'no object "kernels"'),
        ('{"kernels": {"4x4 float32, step of 1": "onednn"}}', "choose from sum-1, sum-2"),
        ('{"kernels": {"4x4 float32, prompt of 128": []}}', "choose from onednn"),
        ('{"kernels": {"4x4 float32, prompt": "onednn"}}', "does not say of how many rows"),
    ],
)
def test_a_file_that_pins_nothing_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "kernels.json"
    path.write_text(text)
    with pytest.raises(candidates.InvalidKernels, match=message):
        candidates.read(path)


def test_a_session_of_a_baseline_pins_its_kernels(tmp_path: Path) -> None:
    path = tmp_path / "session.json"
    figures: list[dict[str, Any]] = [
        {"kernels": {"a, prompt of 512": "linear"}},
        {"kernels": None},
        {"kernels": {"b": "sum-4"}},
    ]
    path.write_text(json.dumps({"figures": figures}))
    assert candidates.pinned(str(path)) == {"a, prompt of 512": "linear", "b": "sum-4"}
    path.write_text(json.dumps({"figures": [*figures, {"kernels": {"b": "sum-1"}}]}))
    with pytest.raises(candidates.InvalidKernels, match="b has two kernels, sum-4 and sum-1"):
        candidates.pinned(str(path))


def test_default_pins_every_product() -> None:
    assert candidates.pinned("default") == {}


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(candidates.InvalidKernels, match="cannot be read"):
        candidates.read(tmp_path / "kernels.json")


def test_pinned_kernels_change_what_they_name_and_nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "LEAST_BYTES", 1)
    monkeypatch.setattr(choices_file, "completed", lambda *_: pytest.fail("timed"))
    pinned = {"16x32 float32, step of 1": "sum-4"}
    _, kernels = Choice(describe(ARCHITECTURES["llama"]()), pinned).of_batch(1)
    assert {name for name, kernel in kernels.items() if kernel == "sum-4"} == set(pinned)


@pytest.mark.parametrize("kernel", ["onednn", "weight-first"])
def test_a_pinned_kernel_that_this_processor_lacks_names_its_flag(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "has_bfloat16", lambda: False)
    model, name = describe(ARCHITECTURES["llama"]().bfloat16()), "mlp gated 64x32 bfloat16, prompt of 128"
    with pytest.raises(Unsupported, match=rf"\(--kernels\) name {kernel} for {name}.* {kernel}-wide computes it"):
        Choice(model, {name: kernel}).of_batch(1)
    for there in (f"{kernel}-wide", "linear"):
        assert Choice(model, {name: there}).of_batch(1)[1][name] == there
    monkeypatch.setattr(choice, "has_bfloat16", lambda: True)
    assert Choice(model, {name: kernel}).of_batch(1)[1][name] == kernel


def test_there_is_no_choice_but_on_a_cpu() -> None:
    """Elsewhere `F.linear` computes every product, whatever is pinned."""
    model = ARCHITECTURES["llama"]()
    here = Compiled(model, backend="eager")
    assert here.choose_kernels(1)["32x32 float32, step of 1"] == "sum-2"
    elsewhere = Compiled(model.to("meta"), backend="eager", kernels={"32x32 float32, step of 1": "sum-4"})
    assert elsewhere.choose_kernels(1) == {}
    assert elsewhere.kernels is None
