"""Kernels with a known amount of work, the products and data that all devices share, and typical rates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # the kernels are built in workers; nothing that reads a stored run imports torch through this module
    from torch import Tensor

MAX_WEIGHTS = 16
"""Matrices that a product rotates through, as a model does through its layers."""
BLOCK_NUMBERS = 1 << 24
"""Random numbers that are drawn; the data repeat them, since drawing takes longer than copying."""


class Rates(NamedTuple):
    """How fast a device of its kind works, roughly: for estimates before anything is measured."""

    flops_per_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class Kernel:
    """Something to time: `run(i)` is the i-th pass, which moves `amount` bytes or does `amount` FLOPs."""

    name: str
    amount: int
    run: Callable[[int], object]


@dataclass(frozen=True)
class Products:
    """The operands of square products: activations `x [rows, features]` and weights `[features, features]` each."""

    x: Tensor
    weights: Sequence[Tensor]

    @property
    def flops(self) -> int:
        """FLOPs of one product."""
        rows, features = self.x.shape
        return 2 * rows * features**2

    @property
    def shape(self) -> str:
        """Rows, features in and features out, as in `512x1024x1024`."""
        rows, features = self.x.shape
        return f"{rows}x{features}x{features}"

    def rotating(self, name: str, product: Callable[[Tensor, Tensor], Tensor]) -> Kernel:
        """Make a kernel whose i-th pass is `product(x, weights[i])`, beginning anew after the last weight."""
        x, weights = self.x, self.weights
        return Kernel(f"{name} {self.shape}", self.flops, lambda i: product(x, weights[i % len(weights)]))


def products(data: Tensor, shapes: Sequence[tuple[int, int]]) -> Iterator[Products]:
    """Cut `data` (one dimension) into the weights of each shape (rows, features); shapes too large for it are left out.

    The activations are random numbers from 0 to 1 in the data's dtype.
    """
    import torch

    for rows, features in shapes:
        count = min(MAX_WEIGHTS, data.numel() // features**2)
        if count:
            x = torch.rand(rows, features, device=data.device).to(data.dtype)
            yield Products(x, list(data[: count * features**2].view(count, features, features)))


def random_data(device: str, dtype: str, n_bytes: int) -> Tensor:
    """Make random numbers from 0 to 1, one block of them repeated: `n_bytes` or up to a block more, one dimension."""
    import torch

    block = torch.rand(BLOCK_NUMBERS, dtype=torch.float32, device=device).to(getattr(torch, dtype))
    return block.repeat(-(-n_bytes // block.nbytes))
