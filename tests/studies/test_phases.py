"""One benchmark per strategy and phase: `nox -s perf`. Set-up does the prefill, the target is the phase alone.

`-- --model smollm2-135m` times another model than random:tiny, `--n-prompt` and `--n-gen` other lengths
(tests/studies/conftest.py); `kvbench run -m MODEL -p N_PROMPT -n N_GEN -t 1` measures the same cases, and
`nox -s study -- agreement` compares them. A decode here is a whole phase of n_gen - 1 steps,
`extra_info["tpot_ms"]` its median per step. hf-generate is called once a step here and pays for its set-up each time; a
run calls it once for all of them.
"""

from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench.case import Sweep
from bench.measure.references import token_ids
from kvcache import models
from kvcache.caches.contract import Unsupported
from kvcache.proof.tokens import agreement, reference
from kvcache.strategies.catalogue import STRATEGIES, build
from kvcache.strategies.strategy import Strategy

ROUNDS = 12

pytestmark = pytest.mark.perf


@pytest.fixture(scope="module")
def cell(request: pytest.FixtureRequest) -> Any:
    """The model, its case, the prompt, and what naive re-feed emits."""
    torch.set_num_threads(1)
    options = request.config.option
    sweep = Sweep(models=(options.model,), n_prompt=(options.n_prompt,), n_gen=(options.n_gen,), n_threads=(1,))
    case = sweep.cases()[0]
    model = models.load(case.model)
    _, prompt = token_ids(case, model.config.get_text_config(decoder=True).vocab_size)
    return model, case, prompt, reference(model, prompt, case.n_gen)


@pytest.fixture(params=STRATEGIES)
def strategy(request: pytest.FixtureRequest, cell: Any) -> Strategy:
    """Prepared, and proved to emit the right tokens before anything is timed."""
    model, case, prompt, expected = cell
    made = build(request.param, model)
    try:
        made.prepare(1, case.capacity)
        assert agreement(made, prompt, expected).tokens_match == "true"
    except Unsupported as reason:
        pytest.skip(str(reason))
    return made


@pytest.mark.benchmark(group="prefill", disable_gc=True)
def test_prefill(benchmark: BenchmarkFixture, strategy: Strategy, cell: Any) -> None:
    prompt: Tensor = cell[2]

    def prefill() -> Tensor:
        return strategy.prefill(prompt).argmax(dim=-1)

    token = benchmark.pedantic(prefill, setup=strategy.reset, rounds=ROUNDS, warmup_rounds=2)
    assert torch.equal(token, cell[3].tokens[:, 0])


@pytest.mark.benchmark(group="decode", disable_gc=True)
def test_decode(benchmark: BenchmarkFixture, strategy: Strategy, cell: Any) -> None:
    _, case, prompt, expected = cell

    def prefilled() -> tuple[tuple[Tensor], dict[str, Any]]:
        strategy.reset()
        return (strategy.prefill(prompt).argmax(dim=-1, keepdim=True),), {}

    def decode(token: Tensor) -> Tensor:
        for _ in range(case.n_gen - 1):
            token = strategy.decode(token).argmax(dim=-1, keepdim=True)
        return token

    last = benchmark.pedantic(decode, setup=prefilled, rounds=ROUNDS, warmup_rounds=2)
    benchmark.extra_info["tpot_ms"] = 1e3 * benchmark.stats.stats.median / (case.n_gen - 1)
    assert torch.equal(last[:, 0], expected.tokens[:, -1])
