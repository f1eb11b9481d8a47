"""The products of `compiled`: `x @ weight.T + bias` by each of the candidates (`candidates.py`).

Axes: `batch` sequences, `q` positions of one forward, `in` and `out` features.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from kvcache.compiled import candidates
from kvcache.compiled.candidates import PROMPT_ROWS

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""`x [batch, q, in]`, `weight [out, in]`, `bias [out]` or None -> `[batch, q, out]`."""

FEW_ROWS = 8
"""Up to here a step's default is a multiply-and-sum, above it a GEMM: where neither was timed.

A step of 8 sequences takes 34 ms by sums; one of 16 takes 83, and 77 by `F.linear` (Zen 3, SmolLM2-135M, float32)."""

SUMS = {"sum-1": 1, "sum-2": 2, "sum-4": 4}
"""The multiply-and-sums, and at how many places each reads a weight at once."""


class Linear(NamedTuple):
    """`weight [out, in]`, `bias [out]` or None, and which candidates compute the product."""

    weight: Tensor
    bias: Tensor | None = None
    step: str = "sum-2"
    prompt: tuple[str, ...] = ()
    """One for each of PROMPT_ROWS; empty: the default of its dtype."""

    @property
    def shape(self) -> str:
        """Features out and in, and dtype, as in `1536x576 float32`: equal for products of equal cost."""
        out_features, in_features = self.weight.shape
        return f"{out_features}x{in_features} {str(self.weight.dtype).removeprefix('torch.')}"

    @property
    def default_prompt(self) -> str:
        """The candidate for a prompt where none was timed."""
        return default_prompt(self.weight.dtype)

    def over_prompt(self, x: Tensor, kernel: str) -> Tensor:
        """Compute the product by a candidate, its result as the rest of a layer takes it: `[batch, q, out]`."""
        return PROMPT[kernel](x, self.weight, self.bias).contiguous()


def product(x: Tensor, linear: Linear) -> Tensor:
    """`x [batch, q, in]` times a linear's weight: `[batch, q, out]`, which may be a view of `[out, batch * q]`."""
    if x.device.type != "cpu":
        return functional.linear(x, linear.weight, linear.bias)
    if torch.compiler.is_compiling():
        return STEP[linear.step](x, linear.weight, linear.bias)
    # One position is a step that is run as it stands, to be counted: with the weight first it would count as many rows.
    chosen = linear.prompt[nearest(x.shape[0] * x.shape[1])] if linear.prompt and x.shape[1] > 1 else ""
    return PROMPT[chosen or linear.default_prompt](x, linear.weight, linear.bias)


def nearest(rows: int) -> int:
    """Return the index of that number of PROMPT_ROWS which is nearest to `rows`, by ratio."""
    return min(range(len(PROMPT_ROWS)), key=lambda i: max(rows / PROMPT_ROWS[i], PROMPT_ROWS[i] / rows))


def default_step(rows: int, out_features: int) -> str:
    """Return the candidate for a step of so many rows where none was timed.

    Few rows are bound by reading the weight, and inductor turns a multiply-and-sum, one reduction per row over the same
    loop, into one pass over it at the speed of memory (`F.linear`: a quarter of that on Zen 4). Two places at once are
    5 % faster there than one, and as fast as four.
    """
    if rows > FEW_ROWS:
        return "linear"
    return "sum-2" if out_features % SUMS["sum-2"] == 0 else "sum-1"


def default_prompt(dtype: torch.dtype, name: str = "onednn") -> str:
    """Return the candidate for a prompt where none was timed: oneDNN's.

    On the plain weight it has 0.9 of its speed on a packed one, and on Zen 4 and 5 1.2 to 1.8 times that of `F.linear`
    in float32. It is called in float32 where oneDNN has no product of bfloat16 (an x86 processor without AVX-512).
    """
    return name + candidates.WIDE if dtype == torch.bfloat16 and not has_bfloat16() else name


def has_bfloat16() -> bool:
    """Return whether oneDNN has products of bfloat16 on this processor."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001  # no public name


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` by oneDNN, on a weight that is not packed."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # noqa: SLF001  # no public name
    return result


def weight_first(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `onednn_linear`, of which the weight is the first factor: a transposed view of `[out, batch * q]`."""
    result = onednn_linear(weight, x.flatten(0, 1))
    if bias is not None:
        result = result.add_(bias.unsqueeze(1))
    return result.t().view(*x.shape[:2], -1)


def weight_first_step(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` by torch's product with the weight as first factor: a transposed view of `[out, rows]`.

    It lays nothing out anew for few rows: 16 rows take 0.65 to 0.8 of `F.linear`'s time in float32 (AVX2).
    """
    result = torch.mm(weight, x.flatten(0, 1).t()).t()
    if bias is not None:
        result = result + bias
    return result.view(*x.shape[:2], -1)


def summed(streams: int) -> Product:
    """Make the multiply-and-sum that reads a weight at so many places at once, to be compiled by inductor.

    More than one place keeps more of the memory's channels busy.
    """

    def kernel(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows, out_features = x.shape[0] * x.shape[1], weight.shape[0]
        places = streams if out_features % streams == 0 else 1
        parts = weight.float().unflatten(0, (places, -1)).unbind(0)
        own = x.flatten(0, 1) if places > 1 else materialised(x.flatten(0, 1))
        sums = torch.stack([(part * row).sum(-1) for row in own.float().unbind(0) for part in parts])
        sums = sums.view(rows, out_features)
        if bias is not None:
            sums = sums + bias
        return sums.to(x.dtype).view(*x.shape[:2], -1)

    return kernel


def materialised(x: Tensor) -> Tensor:
    """Have inductor store `x [rows, in]`, which it would compute anew for every row of a weight.

    It does that to a value with one reader: with eight sequences and one place at a time the head took 58 ms, of which
    its product is 6. `as_strided` takes what lies in memory.
    """
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())


def widened(kernel: Product) -> Product:
    """Make a product of bfloat16 that computes in float32."""

    def wide(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return kernel(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    return wide


STEP: dict[str, Product] = {
    **{name: summed(places) for name, places in SUMS.items()},
    "linear": functional.linear,
    "weight-first": weight_first_step,
}
"""`candidates.STEP`, to be called within a function that inductor compiles.

Not oneDNN's on the weight as it lies: inductor fuses an activation into it, and then takes constant weights only."""

PROMPT: dict[str, Product] = {
    "onednn": onednn_linear,
    "linear": functional.linear,
    "weight-first": weight_first,
    "onednn-wide": widened(onednn_linear),
    "linear-wide": widened(functional.linear),
    "weight-first-wide": widened(weight_first),
}
"""`candidates.PROMPT`."""


def prompt_kernels(dtype: torch.dtype) -> dict[str, Product]:
    """Return the candidates for a prompt in `dtype`: those that compute in float32 are for bfloat16 alone."""
    narrow = dtype == torch.bfloat16
    return {name: kernel for name, kernel in PROMPT.items() if narrow or not name.endswith(candidates.WIDE)}
