"""Decode of `compiled` against generate() of transformers: a model of 100 to 200 million parameters a family (minutes).

All models are random, of SmolLM2-135M's size where the family allows. All arms run in one process and take turns in the
same rounds, so the speed-up of each family is compared with Llama's round by round. Each arm's tokens are compared with
one parallel forward first. Prints a table; no time is asserted.
"""

import argparse
import os
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bench.analysis.estimators import Ratio, median_interval, paired_ratio
from bench.machine.affinity import usable_cores
from bench.measure.server_process import worker_environment
from kvcache.compiled.strategy import Compiled
from kvcache.models.random_weights import seeded
from kvcache.models.skeleton import count_parameters
from kvcache.proof.tokens import agreement, reference
from kvcache.strategies.hf_generate import HfGenerate
from kvcache.strategies.strategy import Strategy
from tests.studies.overhead import turns

_LLAMA: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
_GEMMA = {**_LLAMA, "head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 128}
_NEOX = {name: value for name, value in _LLAMA.items() if name != "num_key_value_heads"}

GEOMETRIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _LLAMA),
    "mistral": ("mistral", _LLAMA),
    "qwen2": ("qwen2", _LLAMA),
    "qwen3": ("qwen3", {**_LLAMA, "head_dim": 64}),
    "phi3": ("phi3", _LLAMA),
    "gemma2": ("gemma2", _GEMMA),
    "gemma3": ("gemma3_text", _GEMMA),
    "olmo2": ("olmo2", _LLAMA),
    "granite": ("granite", {**_LLAMA, "attention_multiplier": 0.125, "residual_multiplier": 0.22}),
    "smollm3": ("smollm3", {**_LLAMA, "no_rope_layer_interval": 4}),
    "stablelm": ("stablelm", _LLAMA),
    "gpt_neox": ("gpt_neox", {**_NEOX, "intermediate_size": 2304}),
    "mixtral": (
        "mixtral",
        {**_LLAMA, "num_hidden_layers": 16, "intermediate_size": 512, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            **_LLAMA,
            "head_dim": 64,
            "num_hidden_layers": 16,
            "moe_intermediate_size": 256,
            "num_experts": 16,
            "num_experts_per_tok": 4,
        },
    ),
}
"""Family -> (model type, what differs from the defaults of its config class).

GPT-NeoX has a feed-forward block of 4 times its width, mixtures fewer layers, a quarter of whose experts are read.
"""

YARDSTICK = "llama"
WARMUPS = 2


@dataclass
class Arm:
    """One family, decoded by both strategies in turn."""

    family: str
    parameters: int
    compiled: Strategy
    yardstick: Strategy
    tokens: str
    times_ms: dict[str, list[float]] = field(default_factory=lambda: {"compiled": [], "hf-generate": []})

    def speedups(self) -> list[float]:
        """Return, per round, how many times faster `compiled` was."""
        pairs = zip(self.times_ms["hf-generate"], self.times_ms["compiled"], strict=True)
        return [generate / compiled for generate, compiled in pairs]


def model_of(family: str, dtype: torch.dtype, n_layers: int | None) -> PreTrainedModel:
    """Draw a family's model."""
    model_type, geometry = GEOMETRIES[family]
    no_special_tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    layers = {} if n_layers is None else {"num_hidden_layers": n_layers}
    config = AutoConfig.for_model(model_type, **geometry | no_special_tokens | layers)
    with seeded(0):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.eval().requires_grad_(False)
    return model


def arm(family: str, arguments: argparse.Namespace) -> Arm:
    """Load, compile and check one family."""
    model = model_of(family, getattr(torch, arguments.dtype), arguments.n_layers)
    prompt = prompt_of(arguments)
    expected = reference(model, prompt, arguments.n_gen)
    compiled, yardstick = Compiled(model), HfGenerate(model)
    matches = []
    for strategy in (compiled, yardstick):
        strategy.prepare(len(prompt), prompt.shape[1] + arguments.n_gen)
        matches.append(agreement(strategy, prompt, expected).tokens_match)
    return Arm(family, count_parameters(model), compiled, yardstick, tokens=" / ".join(matches))


def prompt_of(arguments: argparse.Namespace) -> torch.Tensor:
    """Draw the prompt, the same for every family."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(_LLAMA["vocab_size"], (arguments.batch_size, arguments.n_prompt), generator=generator)


def decode_ms(strategy: Strategy, prompt: torch.Tensor, n_gen: int) -> float:
    """Time a decode step: the mean over a generation, its prefill left out."""
    strategy.reset()
    stamps: list[int] = []
    strategy.generate(prompt, n_gen, lambda *_: stamps.append(time.perf_counter_ns()))
    return (stamps[-1] - stamps[0]) / 1e6 / (n_gen - 1)


def with_interval(ratio: Ratio) -> str:
    """Write a ratio, with its interval where there is one."""
    return f"{ratio.estimate:.2f}" + ("" if ratio.low is None else f" [{ratio.low:.2f}-{ratio.high:.2f}]")


def main() -> None:
    """Measure, and print one line per family."""
    parser = argparse.ArgumentParser(
        prog="nox -s study -- compiled_families", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--families", default=",".join(GEOMETRIES), help="comma-separated; llama is always among them")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--n-prompt", type=int, default=32)
    parser.add_argument("--n-gen", type=int, default=17)
    parser.add_argument("--n-layers", type=int, help="fewer layers, for a quick look")
    parser.add_argument("--rounds", type=int, default=12)
    arguments = parser.parse_args()
    names = list(dict.fromkeys([YARDSTICK, *arguments.families.split(",")]))
    if unknown := sorted(set(names) - set(GEOMETRIES)):
        parser.error(f"--families: no geometry named {', '.join(unknown)}; valid: {', '.join(GEOMETRIES)}")
    n_threads = usable_cores()
    if "MALLOC_TRIM_THRESHOLD_" not in os.environ:  # start again, set up as every worker is
        os.execve(sys.executable, sys.orig_argv, worker_environment(n_threads))  # noqa: S606  # no shell is wanted
    torch.set_num_threads(n_threads)
    arms = []
    for name in names:
        arms.append(arm(name, arguments))
        print(f"{name}: loaded, compiled and checked", file=sys.stderr, flush=True)
    prompt = prompt_of(arguments)
    for number in range(-WARMUPS, arguments.rounds):
        for each in turns(arms, number):
            pair = {"compiled": each.compiled, "hf-generate": each.yardstick}
            for strategy in sorted(pair, reverse=number % 2 == 0):
                taken = decode_ms(pair[strategy], prompt, arguments.n_gen)
                if number >= 0:
                    each.times_ms[strategy].append(taken)
    print(f"{arguments.dtype}, batch {arguments.batch_size}, {n_threads} threads, {arguments.rounds} rounds\n")
    print("| family | parameters, M | tokens match | compiled, ms | generate, ms | times faster | of Llama's |")
    print("|---|---|---|---|---|---|---|")
    llama = arms[0].speedups()
    for each in arms:
        medians = (f"{median_interval(each.times_ms[name])[0]:.1f}" for name in ("compiled", "hf-generate"))
        faster = with_interval(paired_ratio(each.times_ms["hf-generate"], each.times_ms["compiled"]))
        share = with_interval(paired_ratio(each.speedups(), llama))
        cells = (each.family, f"{each.parameters / 1e6:.0f}", each.tokens, *medians, faster, share)
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
