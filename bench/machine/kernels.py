"""Kernels with a known amount of work, the products and data that all devices share, and typical rates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from bench.manifest import Product

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
    """Its kind, and for a product the shape after a space."""
    amount: int
    run: Callable[[int], object]

    @property
    def kind(self) -> str:
        """What its name begins with."""
        return self.name.partition(" ")[0]


@dataclass(frozen=True)
class Products:
    """The operands of products of one shape: activations `x [rows, in]` and weights `[out, in]` each."""

    x: Tensor
    weights: Sequence[Tensor]

    @property
    def flops(self) -> int:
        """FLOPs of one product."""
        return 2 * len(self.x) * self.weights[0].numel()

    @property
    def shape(self) -> str:
        """Rows, features in and features out, as in `512x1024x1024`."""
        n_out, n_in = self.weights[0].shape
        return f"{len(self.x)}x{n_in}x{n_out}"

    def rotating(self, name: str, product: Callable[[Tensor, Tensor], Tensor]) -> Kernel:
        """Make a kernel whose i-th pass is `product(x, weights[i])`, beginning anew after the last weight."""
        x, weights = self.x, self.weights
        return Kernel(f"{name} {self.shape}", self.flops, lambda i: product(x, weights[i % len(weights)]))


def untransposed(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply `x [rows, in]` with the numbers of `weight [out, in]` taken for `[in, out]`, as `mm` likes them best."""
    import torch

    return torch.mm(x, weight.view(weight.shape[1], weight.shape[0]))


def products(data: Tensor, shapes: Iterable[Product]) -> Iterator[Products]:
    """Cut `data` (one dimension) into the weights of each shape; shapes too large for it are left out.

    The activations are random numbers from 0 to 1 in the data's dtype.
    """
    import torch

    for rows, n_in, n_out in shapes:
        count = min(MAX_WEIGHTS, data.numel() // (n_in * n_out))
        if count:
            x = torch.rand(rows, n_in, device=data.device).to(data.dtype)
            yield Products(x, list(data[: count * n_in * n_out].view(count, n_out, n_in)))


def random_data(device: str, dtype: str, n_bytes: int) -> Tensor:
    """Make random numbers from 0 to 1, one block of them repeated: `n_bytes` or up to a block more, one dimension."""
    import torch

    block = torch.rand(BLOCK_NUMBERS, dtype=torch.float32, device=device).to(getattr(torch, dtype))
    return block.repeat(-(-n_bytes // block.nbytes))
