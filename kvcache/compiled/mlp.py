"""The feed-forward block that every position passes through whole."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvcache.compiled.kernels import Activation, Linear, is_few_rows, product, product_by_feature


class Mlp(NamedTuple):
    """`gate` is None where the architecture has none."""

    gate: Linear | None
    up: Linear
    down: Linear

    def feed(self, x: Tensor, activation: Activation) -> Tensor:
        """Compute the block over `x [batch, q, hidden]`."""
        if is_few_rows(x) or x.device.type != "cpu" or torch.compiler.is_compiling():
            up = product(x, self.up)
            inner = activation(up) if self.gate is None else activation(product(x, self.gate)) * up
            return product(inner, self.down)
        rows = x.flatten(0, 1)
        up = product_by_feature(rows, self.up)
        inner = activation(up) if self.gate is None else activation(product_by_feature(rows, self.gate)).mul_(up)
        return product_by_feature(inner.t(), self.down).t().view(*x.shape[:2], -1)
