"""A long prompt passes through a layer in pieces: the same logits, and no memory that grows with its square."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kvcache.compiled import cache
from kvcache.compiled import strategy as module
from kvcache.compiled.quantized import CompiledInt4, CompiledInt8
from kvcache.compiled.strategy import Compiled, piece_size
from kvcache.proof.workspace import LiveBytes
from tests.compiled.families import family
from tests.tiny import ARCHITECTURES, token_ids

pytestmark = pytest.mark.usefixtures("untraced")

VARIANTS: list[tuple[str, type[Compiled], dict[str, bool]]] = [
    *((name, Compiled, {}) for name in ("gpt2", "mistral", "gemma2", "mixtral")),
    ("gemma2", CompiledInt8, {}),
    ("mistral", CompiledInt8, {"prefill_as_stored": True}),
    ("mistral", CompiledInt4, {}),
]
"""Learned and rotary positions, a window in all layers and in some, a soft-cap, experts; and rows that are rounded."""


@pytest.mark.parametrize(
    ("batch_size", "n_prompt", "size"),
    [(1, 512, 512), (1, 513, 257), (1, 8000, 500), (4, 129, 65), (16, 128, 32), (600, 3, 1), (10_000, 2, 1)],
)
def test_pieces_are_of_about_equal_size(batch_size: int, n_prompt: int, size: int) -> None:
    assert piece_size(batch_size, n_prompt) == size


@pytest.mark.parametrize(("name", "kind", "options"), VARIANTS)
@pytest.mark.parametrize(("n_depth", "rows"), [(0, 2), (5, 30)])
def test_pieces_give_the_logits_of_the_whole(
    name: str,
    kind: type[Compiled],
    options: dict[str, bool],
    n_depth: int,
    rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From nothing by single positions, and after a context by several."""
    model = family(name)
    context = token_ids(1, 2, n_depth) if n_depth else None
    prompt, then = token_ids(2, 2, 31), token_ids(3, 2, 1)
    found = []
    for piece_rows in (10_000, rows):
        monkeypatch.setattr(module, "PIECE_ROWS", piece_rows)
        own = kind(model, backend="eager", **options)
        own.prepare(2, 40, context)
        found += [torch.stack([own.prefill(prompt), own.decode(then)])]
    # What rounds keys and values may round one the other way for its last bit.
    tolerance = 1e-4 if kind is Compiled else 1e-2
    torch.testing.assert_close(found[1], found[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "n_depth", "calls"), [("llama", 0, 4), ("llama", 5, 16), ("mistral", 0, 16)])
def test_attention_needs_a_mask_only_after_a_context_or_by_a_window(
    name: str, n_depth: int, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four layers, a prompt in four pieces: at once it is torch's causal kernel, which skips what nobody sees."""
    masks: list[Tensor | None] = []
    attend = cache.attend_at_once

    def note(*args: Any) -> Tensor:
        masks.append(args[-1])
        return attend(*args)

    own = Compiled(family(name), backend="eager")
    own.prepare(1, 40, token_ids(1, 1, n_depth) if n_depth else None)
    monkeypatch.setattr(module, "PIECE_ROWS", 8)
    monkeypatch.setattr(cache, "attend_at_once", note)
    own.prefill(token_ids(2, 1, 31))
    assert len(masks) == calls
    assert [mask is None for mask in masks] == [n_depth == 0 and (name == "llama" or i % 4 == 0) for i in range(calls)]


@pytest.mark.parametrize(("name", "kind", "options"), VARIANTS)
def test_no_allocation_grows_with_the_square_of_the_prompt(
    name: str, kind: type[Compiled], options: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, most = family(name), []
    monkeypatch.setattr(module, "PIECE_ROWS", 8)
    for n_prompt in (31, 62, 124):
        own = kind(model, backend="eager", **options)
        own.prepare(1, n_prompt)
        with LiveBytes() as live:  # it takes composites apart, attention among them
            own.prefill(token_ids(0, 1, n_prompt))
        most.append(live.most)
    assert most[2] - most[1] <= 2.2 * (most[1] - most[0]) + 4096


@pytest.mark.parametrize("kind", [Compiled, CompiledInt8, CompiledInt4])
def test_a_prompt_is_held_exactly_for_one_layer_at_a_time(kind: type[Compiled]) -> None:
    """Twice the layers need no more memory beside the cache: not the exact keys and values of those that are added."""
    n_prompt, most = 120, []
    for n_layers in (3, 6):
        own = kind(ARCHITECTURES["llama"](num_hidden_layers=n_layers), backend="eager")
        own.prepare(1, n_prompt)
        with LiveBytes() as live:
            own.prefill(token_ids(0, 1, n_prompt))
        most.append(live.most)
    of_added_layers = 3 * 2 * 2 * 8 * n_prompt * 4
    assert most[1] - most[0] < of_added_layers / 20
