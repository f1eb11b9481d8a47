"""The feed-forward block that every position passes through whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional

from kvcache.compiled.candidates import PROMPT_ROWS
from kvcache.compiled.kernels import Activation
from kvcache.compiled.products import Linear, default_prompt, product


class Mlp(NamedTuple):
    """`gate` is None where the architecture has none."""

    gate: Linear | None
    up: Linear
    down: Linear

    @property
    def shape(self) -> str:
        """Its features, inner and outer, whether it has a gate, and its dtype: equal for blocks of equal cost."""
        gated = "" if self.gate is None else " gated"
        return f"mlp{gated} {self.up.shape}"

    @property
    def default_prompt(self) -> str:
        """The candidate for a prompt where none was timed.

        oneDNN lays its second factor out anew at every call. With the weight as the first that is the prompt's few rows
        (200 against 186 GFLOP/s at 128 rows in float32, 380 against 353 in bfloat16, on Zen 4), and what stands between
        the products of a block does not care which axis comes first.
        """
        return default_prompt(self.up.weight.dtype, "weight-first")

    @property
    def weight(self) -> Tensor:
        """Its first weight, `[inner, hidden]`, for its shape and size."""
        return self.up.weight

    def over_prompt(self, x: Tensor, kernel: str) -> Tensor:
        """Compute the block by a candidate, with a fixed activation for all; what that is hardly counts."""
        return self.with_kernels(lambda own: own.step, lambda _: (kernel,) * len(PROMPT_ROWS)).feed(x, functional.silu)

    def with_kernels(self, step: Callable[[Linear], str], prompt: Callable[[Linear | Mlp], tuple[str, ...]]) -> Mlp:
        """Return the same block with the kernels that `step` says of each product, and `prompt` of the whole.

        `prompt` returns one for each of PROMPT_ROWS.
        """
        whole = prompt(self)

        def chosen(linear: Linear) -> Linear:
            return linear._replace(step=step(linear), prompt=whole)

        return Mlp(self.gate and chosen(self.gate), chosen(self.up), chosen(self.down))

    def feed(self, x: Tensor, activation: Activation) -> Tensor:
        """Compute the block over `x [batch, q, hidden]`; between its products either axis may come first."""
        up = product(x, self.up)
        inner = activation(up) if self.gate is None else activation(product(x, self.gate)).mul_(up)
        return product(inner, self.down)
