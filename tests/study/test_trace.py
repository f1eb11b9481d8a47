"""What a trace says is what ran: fed, cached and the largest product against counters; its table, JSON and pictures."""

import dataclasses
import errno
import io
import json
import math
import sys
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bench.cli import main
from bench.machine.clock import Times
from bench.study import trace as tracing
from bench.study.trace import ShownStep, Trace
from bench.study.trace_pictures import Picture, check, draw
from bench.study.trace_tables import as_json, inputs, markdown, terminal
from kvcache.learn.trace import Product, Step, trace
from kvcache.proof.operations import count_operations
from kvcache.strategies.catalogue import build
from kvcache.strategies.naive import Naive
from kvcache.strategies.strategy import Strategy
from tests.commandline import kvbench, refused
from tests.commands.test_lost_outputs import Refusing
from tests.strategies.test_equivalence import MODELS, model_of, token_ids
from tests.study.test_train import SENTENCE
from tests.tiny import EVERYWHERE, build_without_compiler

CAPACITY = 15
"""Of every strategy, for the longest example: with one capacity `compiled` traces its step once, not per example."""


@cache
def strategy_of(name: str) -> Strategy:
    return build_without_compiler(name, model_of("llama"))


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("name", EVERYWHERE)
@settings(max_examples=5)
@given(n_prompt=st.integers(1, 9), n_gen=st.integers(1, 6), seed=st.integers(0, 99))
def test_naive_is_fed_everything_and_a_cached_strategy_one_token(name, n_prompt: int, n_gen: int, seed: int) -> None:
    prompt = token_ids(seed, 1, n_prompt)
    strategy = strategy_of(name)
    strategy.prepare(1, CAPACITY)
    steps = trace(strategy, prompt, n_gen)
    strategy.reset()
    assert [step.out for step in steps] == strategy.generate(prompt, n_gen)[0].tolist()
    everything = [*prompt[0].tolist(), *(step.out for step in steps)]
    assert steps[0].fed == tuple(everything[:n_prompt])
    for place, step in enumerate(steps[1:], n_prompt):
        if strategy.reads_cache:
            assert (step.fed, step.n_cached) == ((everything[place],), place)
            assert step.kv_bytes == place * steps[1].kv_bytes // n_prompt
        else:
            assert (step.fed, step.n_cached, step.kv_bytes) == (tuple(everything[: place + 1]), 0, 0)


@pytest.mark.parametrize("architecture", MODELS)
def test_largest_product_is_the_one_that_runs(architecture: str) -> None:
    """Against hooks on every linear layer of the model but its head."""
    model, prompt = model_of(architecture), token_ids(5, 1, 6)
    strategy = build("dynamic", model)
    strategy.prepare(1, 9)
    steps = trace(strategy, prompt, 3)
    strategy.reset()
    expected = [largest_seen(model, lambda: strategy.prefill(prompt))]
    expected += [
        largest_seen(model, lambda out=step.out: strategy.decode(torch.tensor([[out]]))) for step in steps[:-1]
    ]
    assert [step.product for step in steps] == expected
    assert [step.product.kind for step in steps] == ["GEMM", "GEMV", "GEMV"]


def largest_seen(model: PreTrainedModel, forward) -> Product:
    seen: list[Product] = []

    def note(_, args, out):
        seen.append(Product(math.prod(args[0].shape[:-1]), args[0].shape[-1], out.shape[-1]))

    linears = (part for part in model.modules() if isinstance(part, nn.Linear | Conv1D))
    hooks = [part.register_forward_hook(note) for part in linears if part is not model.get_output_embeddings()]
    with count_operations(model) as counted:
        forward()
    for hook in hooks:
        hook.remove()
    assert counted.tokens_processed == seen[0].rows
    return max(seen, key=lambda product: product.inner * product.columns)


def test_trace_stops_after_a_stop() -> None:
    strategy = Naive(model_of("gpt2"))
    strategy.prepare(1, 20)
    outs = [step.out for step in trace(strategy, token_ids(1, 1, 4), 9)]
    stop = outs[3]
    first = outs.index(stop)
    assert [step.out for step in trace(strategy, token_ids(1, 1, 4), 9, {stop, None})] == outs[: first + 1]


def handmade() -> Trace:
    """[SOS] -> Love -> that, naive and cached."""
    product = Product(1, 4, 16)
    first = ShownStep(
        step=Step(fed=(1,), n_cached=0, kv_bytes=0, product=product, out=3), fed="[SOS]", out="Love", ms=2
    )
    again = Step(fed=(1, 3), n_cached=0, kv_bytes=0, product=Product(2, 4, 16), out=4)
    one = Step(fed=(3,), n_cached=1, kv_bytes=64, product=None, out=4)
    return Trace(
        model="love",
        setting="love, float32",
        prompt="",
        tokens=("[SOS]", "Love", "a|b"),
        n_prompt=1,
        steps={
            "naive": [first, ShownStep(step=again, fed="[SOS] Love", out="a|b", ms=2.5)],
            "dynamic": [first, ShownStep(step=one, fed="Love", out="a|b", ms=0.5)],
        },
        tokens_match="true",
    )


def test_table_sets_the_strategies_side_by_side() -> None:
    lines = [[cell.strip(" |") for cell in line.split(" | ")] for line in markdown(handmade()).splitlines()[2:6]]
    assert lines[0][1:5] == ["naive fed", "naive cached", "naive product", "naive ms"]
    assert lines[2][1:] == ["[SOS] (1)", "0", "GEMV 1x4x16", "2.00"] * 2 + ["Love"]
    assert lines[3][1:5] == ["[SOS] Love (2)", "0", "GEMM 2x4x16", "2.50"]
    assert lines[3][5:] == ["Love (1)", "1", "-", "0.500", "a\\|b"]
    assert inputs(handmade()).splitlines()[2] == "T=2 naive input: [SOS] Love"


def test_table_fits_a_terminal() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(terminal(handmade()))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 100
    assert "[SOS] Love (2)" in text
    assert "GEMM 2x4x16" in text


def test_json_has_everything() -> None:
    steps = json.loads(as_json(handmade()))["steps"]
    assert steps["dynamic"][1] == {
        "T": 2,
        "fed": "Love",
        "fed_ids": [3],
        "n_fed": 1,
        "n_cached": 1,
        "kv_bytes": 64,
        "product": None,
        "out": "a|b",
        "out_id": 4,
        "ms": 0.5,
    }
    assert steps["naive"][1]["product"] == {"rows": 2, "inner": 4, "columns": 16, "kind": "GEMM"}


@pytest.mark.parametrize("picture", get_args(Picture))
def test_pictures_are_drawn(picture) -> None:
    figure = draw(handmade(), picture)
    figure.canvas.draw()
    shown = " ".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))
    expected = {"masks": "decode with a cache (T=2): one row", "work": "1 again", "shift": "ignored"}
    for name, words in expected.items():
        assert (words in shown) == (picture in {name, "all"})


def test_dollars_in_a_text_are_no_formula(tmp_path: Path) -> None:
    trace = dataclasses.replace(handmade(), tokens=("$", "$\\a{$", "a"))
    check(tmp_path / "trace.svg", "all")(trace)
    assert (tmp_path / "trace.svg").is_file()


# The times: strategies take turns, a step keeps its median, and a slow trace is not repeated for long.


class Clock:
    """Every round takes `step_ns` a stamp, and the prefill ten times as long."""

    def __init__(self, step_ns: int) -> None:
        self.step_ns = step_ns

    def start(self) -> None:
        self.stamps: list[bool] = []

    def stamp(self, *, end_of_phase: bool = False) -> None:
        self.stamps.append(end_of_phase)

    def stop(self) -> Times:
        assert self.stamps[0]
        assert not any(self.stamps[1:])
        return Times(host_ns=[(10 if first else 1) * self.step_ns for first in self.stamps], event_ns=None)


class Recorded:
    """Notes its turns."""

    def __init__(self, name: str, turns: list[str]) -> None:
        self.name, self.turns = name, turns

    def reset(self) -> None:
        self.turns.append(self.name)

    def generate(self, prompt, n_gen, on_step):
        for _ in range(n_gen):
            on_step(prompt[:, 0], prompt)


@pytest.mark.parametrize(("step_ns", "rounds"), [(1000, 25), (10**9, 3), (10**7, 9)])
def test_strategies_take_turns_until_time_is_up(step_ns: int, rounds: int) -> None:
    turns: list[str] = []
    strategies = {name: Recorded(name, turns) for name in ("naive", "dynamic")}
    prompt = torch.zeros(1, 2, dtype=torch.long)
    found = tracing.step_times_ns(strategies, {"naive": 3, "dynamic": 2}, prompt, Clock(step_ns))
    assert turns == ["naive", "dynamic"] * rounds
    assert found == {"naive": [10 * step_ns, step_ns, step_ns], "dynamic": [10 * step_ns, step_ns]}


# The command.


def test_note_s_table(love: Path, tmp_path: Path) -> None:
    plot = tmp_path / "trace.png"
    traced = kvbench("trace", "-m", str(love), "--prompt", "", "-t", "1", "-o", "json", "--plot", str(plot))
    document = json.loads(traced.stdout)
    words = SENTENCE.split()
    naive, cached = document["steps"]["naive"], document["steps"]["dynamic"]
    assert [step["out"] for step in naive] == [step["out"] for step in cached] == [*words, "[EOS]"]
    assert [step["fed"] for step in naive] == [" ".join(["[SOS]", *words[:n]]) for n in range(len(words) + 1)]
    assert [step["fed"] for step in cached] == ["[SOS]", *words]
    assert all(step["ms"] > 0 for step in [*naive, *cached])
    assert document["tokens_match"] == "true"
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_until_and_whole_inputs(love: Path) -> None:
    can = json.loads((love / "tokenizer.json").read_text())["model"]["vocab"]["can"]
    common = ["trace", "--model", str(love), "--prompt", "", "-t", "1", "--until", str(can), "--show-input"]
    out = kvbench(*common, "--strategies", "naive,static").stdout
    assert "| static fed" in out
    assert out.endswith("T=3 naive input: [SOS] Love that\nT=3 static input: that\n")


OWN_CACHES = """
from transformers import DynamicCache, DynamicLayer, Cache

class Blank(DynamicLayer):
    def update(self, keys, values, *args, **kwargs):
        keys, values = super().update(keys, values, *args, **kwargs)
        return keys, values * 0

def lossy(model, prompt_length):
    assert prompt_length == 1
    return Cache(layers=[Blank() for _ in range(model.config.num_hidden_layers)])

def wrong(model):
    return lossy(model, 1)

wrong.promise = "exact"

def nothing(model):
    return {}
"""


@pytest.fixture
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "caches_to_trace.py").write_text(OWN_CACHES)
    monkeypatch.chdir(tmp_path)
    return "cache:caches_to_trace"


def test_other_tokens_of_a_lossy_strategy_are_no_failure(love: Path, own_caches: str) -> None:
    common = ["trace", "--model", str(love), "--prompt", "", "-t", "1", "-n", "6", "-o", "json", "--strategies"]
    traced = kvbench(*common, f"naive,dynamic,{own_caches}:lossy")
    assert json.loads(traced.stdout)["tokens_match"] == "lossy"
    assert "chosen by lossy strategies only" in traced.stderr
    traced = kvbench(*common, f"naive,{own_caches}:wrong,{own_caches}:lossy", code=5)
    assert json.loads(traced.stdout)["tokens_match"] == "false"


def test_generate_takes_the_user_s_own_cache(love: Path, own_caches: str) -> None:
    common = ["generate", "--model", str(love), "--prompt", "", "-t", "1", "-n", "3", "--strategy"]
    assert kvbench(*common, f"{own_caches}:lossy").stdout.strip()
    assert f"--strategy {own_caches}:nothing: returned a dict; valid" in refused(*common, f"{own_caches}:nothing")


@pytest.mark.parametrize(("number", "code"), [(errno.EPIPE, 0), (errno.ENOSPC, 5)])
def test_generate_ends_with_its_reader(love: Path, number: int, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[object] = []
    monkeypatch.setattr(
        "bench.study.generate.TextStreamer.put", lambda _, token: [fed.append(token), sys.stdout.write("word")]
    )
    arguments = ["generate", "--model", str(love), "--prompt", "", "-t", "1", "-n", "6"]
    with redirect_stdout(Refusing(number)), pytest.raises(SystemExit) as ended:
        main(arguments)
    assert (ended.value.code, len(fed)) == (code, 1)
    fed.clear()
    kvbench(*arguments)
    assert len(fed) == 6


def test_a_user_s_cache_that_is_none_is_refused(love: Path, own_caches: str) -> None:
    arguments = ["trace", "--model", str(love), "--prompt", "", "-t", "1", "--strategies"]
    line = refused(*arguments, f"naive,{own_caches}:nothing")
    assert f"--strategies {own_caches}:nothing: returned a dict; valid" in line
    assert "--strategies cache:nowhere:make: " in refused(*arguments, "cache:nowhere:make")


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--plot", "trace.doc"], "--plot trace.doc: the suffix"),
        (["--plot", "nowhere/trace.png"], "does not exist"),
        (["--plot", "trace.png", "--picture", "mask"], "did you mean masks"),
        (["--strategies", "naive,dynamik"], "--strategies dynamik: unknown; did you mean dynamic"),
        (["--prompt", "can " * 70], "--prompt: its 71 tokens leave no position of the model's 64; give a shorter one"),
        (["-n", "0"], "--n-gen 0: give an integer of at least 1"),
        (["-n", "65"], "64 positions"),
        (["--until", "5000"], "5000"),
        (["-o", "csv"], "--format csv"),
    ],
)
def test_bad_input_is_refused(love: Path, flags, complaint) -> None:
    assert complaint in refused("trace", "--model", str(love), "--prompt", "", "-t", "1", *flags)
