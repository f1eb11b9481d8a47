"""A step over a mixture of experts reads those that were chosen, each once, and no others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from kvcache.caches.contract import Unsupported
from kvcache.compiled.experts import Experts
from kvcache.compiled.products import FEW_ROWS, Linear
from kvcache.compiled.strategy import Compiled
from tests.compiled.families import family

HIDDEN, INNER = 12, 6


def experts_of(count: int, per_token: int, seed: int) -> Experts:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return Experts(
        router=Linear(random(count, HIDDEN)),
        gate_up=random(count, 2 * INNER, HIDDEN),
        down=random(count, HIDDEN, INNER),
        per_token=per_token,
        normalised=True,
        rounded=False,
    )


def fed_at_once(own: Experts, x: Tensor) -> Tensor:
    """What the compiled path computes, uncompiled."""
    weights, chosen = own._route(x)
    return own._feed_at_once(x.flatten(0, 1), weights, chosen, functional.silu).view(x.shape)


@settings(max_examples=30)
@given(
    rows=st.integers(1, FEW_ROWS),
    sizes=st.integers(1, 9).flatmap(lambda count: st.tuples(st.just(count), st.integers(1, count))),
    seed=st.integers(0, 2**31),
)
def test_both_paths_agree_and_no_other_expert_is_read(rows: int, sizes: tuple[int, int], seed: int) -> None:
    own = experts_of(*sizes, seed)
    x = torch.randn(rows, 1, HIDDEN, generator=torch.Generator().manual_seed(seed))
    _, chosen = own._route(x)
    others = [expert for expert in range(sizes[0]) if expert not in chosen.unique().tolist()]
    own.gate_up[others], own.down[others] = float("nan"), float("nan")
    one_by_one = own.feed(x, functional.silu)
    assert one_by_one.isfinite().all()
    torch.testing.assert_close(fed_at_once(own, x), one_by_one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [2, 4])
def test_an_expert_that_several_sequences_chose_has_one_slot(rows: int) -> None:
    own = experts_of(16, 4, 0)
    x = torch.randn(1, 1, HIDDEN).expand(rows, -1, -1)
    weights, chosen = own._route(x)
    slots, needed, by_slot = own._slots(weights, chosen)
    assert needed is not None
    assert sorted(slots[needed].tolist()) == sorted(chosen[0].tolist())
    assert len(slots) == min(16, rows * 4)
    torch.testing.assert_close(by_slot.sum(1), weights.sum(1))


def test_too_large_a_batch_is_refused() -> None:
    strategy = Compiled(family("mixtral"), backend="eager")
    with pytest.raises(Unsupported, match=f"at most {FEW_ROWS} sequences; this is {FEW_ROWS + 1}"):
        strategy.prepare(FEW_ROWS + 1, 40)


def test_quantised_experts_are_refused() -> None:
    model = family.__wrapped__("mixtral")
    experts = model.model.layers[1].mlp.experts
    experts.__class__ = type("Quantised", (type(experts),), {"__module__": "theirs"})
    with pytest.raises(Unsupported, match="Quantised"):
        Compiled(model)
