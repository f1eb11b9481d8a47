"""A mixture of experts: a router chooses some feed-forward blocks for each position, and only their weights are read.

Axes: `rows` are all positions of one forward, `slots` the experts that are read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from kvcache.compiled.kernels import Activation
from kvcache.compiled.mlp import Mlp
from kvcache.compiled.products import Linear, product

DEALT = (0, 4, 2, 6, 1, 5, 3, 7)
"""A thread takes slots that are neighbours. In this order of eighths 2, 4 or 8 threads have as many needed ones."""


class Experts(NamedTuple):
    """The experts of one layer, their weights side by side, as transformers keeps them."""

    router: Linear
    gate_up: Tensor
    """`[experts, 2 * inner, hidden]`"""
    down: Tensor
    """`[experts, hidden, inner]`"""
    per_token: int
    """How many experts a position passes through."""
    normalised: bool
    """The weights of a position's experts are divided by their sum."""
    rounded: bool
    """The weights are rounded to the model's dtype, and with them each expert's share (Qwen3)."""
    prompt: tuple[str, ...] = ()
    """As in `Linear`, for the products of an expert. A step has no choice, nor has the router."""

    def block(self, expert: int) -> Mlp:
        """Return one expert as a block of its own."""
        gate, up = self.gate_up[expert].chunk(2)
        return Mlp(*(Linear(part, prompt=self.prompt) for part in (gate, up, self.down[expert])))

    def with_kernels(self, step: Callable[[Linear], str], prompt: Callable[[Linear | Mlp], tuple[str, ...]]) -> Self:
        """Return the same experts with the kernels that `prompt` says of the first."""
        del step
        return self._replace(prompt=prompt(self.block(0)))

    def feed(self, x: Tensor, activation: Activation) -> Tensor:
        """Compute the block over `x [batch, q, hidden]`."""
        weights, chosen = self._route(x)
        feed = self._feed_at_once if torch.compiler.is_compiling() else self._feed_one_by_one
        return feed(x.flatten(0, 1), weights, chosen, activation).view(x.shape)

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Choose each row's experts: weights and indices, `[rows, per_token]` each."""
        shares = product(x, self.router).flatten(0, 1).float().softmax(-1)
        weights, chosen = shares.topk(self.per_token, dim=-1)
        if self.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        return (weights.to(x.dtype) if self.rounded else weights), chosen

    def _feed_one_by_one(self, rows: Tensor, weights: Tensor, chosen: Tensor, activation: Activation) -> Tensor:
        """Feed each chosen expert the rows that chose it."""
        total = torch.zeros_like(rows, dtype=torch.float32)
        for expert in chosen.unique().tolist():
            row, rank = (chosen == expert).nonzero(as_tuple=True)
            fed = self.block(expert).feed(rows[row].unsqueeze(0), activation)[0]
            total.index_add_(0, row, (fed * weights[row, rank].unsqueeze(1)).float())
        return total.to(rows.dtype)

    def _feed_at_once(self, rows: Tensor, weights: Tensor, chosen: Tensor, activation: Activation) -> Tensor:
        """Feed all rows to every expert that any of them chose; where a row did not choose it, it weighs nothing.

        The number of slots is fixed, as compiled code needs it. A slot that is not needed reads one row of another's
        weights again and again, which stays in the first-level cache.
        """
        slots, needed, by_slot = self._slots(weights, chosen)
        gate, up = self._products([row.unsqueeze(0) for row in rows], self.gate_up, slots, needed).chunk(2, dim=-1)
        inner = activation(gate) * up  # [rows, slots, inner]
        fed = self._products(inner.unbind(0), self.down, slots, needed)
        by_slot = by_slot.unsqueeze(-1)
        # Not a product with zero: what a block that a row did not choose makes of it may be too large for the dtype.
        return (fed * by_slot).float().masked_fill(by_slot == 0, 0).sum(1).to(rows.dtype)

    def _slots(self, weights: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """List the experts to read `[slots]`, which of them are needed (None: all), and weights `[rows, slots]`."""
        if len(chosen) == 1:
            return chosen[0], None, weights
        experts, count = len(self.gate_up), min(len(self.gate_up), chosen.numel())
        by_expert = weights.new_zeros((len(chosen), experts)).scatter(1, chosen, weights)
        used = chosen.new_zeros((len(chosen), experts)).scatter(1, chosen, 1).amax(0)
        needed, slots = used.topk(count)
        dealt = [slot for first in DEALT for slot in range(first, count, len(DEALT))]
        needed, slots = needed[dealt], slots[dealt]
        return slots, needed > 0, by_expert[:, slots]

    def _products(self, rows: Sequence[Tensor], weight: Tensor, slots: Tensor, needed: Tensor | None) -> Tensor:
        """Multiply rows, each `[slots or 1, in]`, with the slots' `weight [experts, out, in]`: `[rows, slots, out]`.

        As in `product`, one reduction per row over the same loop. Where several rows read one index of the weights,
        inductor would copy those first; so each row has the index to itself, and reads what is in the cache already.
        """
        out = weight.shape[1]
        index = slots.unsqueeze(1) * out + torch.arange(out, device=slots.device)
        if needed is not None:
            index = torch.where(needed.unsqueeze(1), index, index[:1, :1])  # the first is always needed
        indices = torch.stack([index] * len(rows)).unbind(0)
        flat = weight.flatten(0, 1)
        pairs = zip(indices, rows, strict=True)
        sums = [(flat[own].float() * row.float().unsqueeze(1)).sum(-1) for own, row in pairs]
        return torch.stack(sums).to(rows[0].dtype)
