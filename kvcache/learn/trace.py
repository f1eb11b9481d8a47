"""The study note's table T=1, T=2, ...: what each step of a strategy was fed, what lay in the cache, what came out."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from kvcache.arithmetic.architectures import UnknownGeometry, geometry
from kvcache.strategies.strategy import Strategy


@dataclass(frozen=True)
class Product:
    """A matrix product, `[rows, inner] x [inner, columns]`."""

    rows: int
    inner: int
    columns: int

    @property
    def kind(self) -> Literal["GEMM", "GEMV"]:
        """Return GEMV for one row, a matrix times a vector, else GEMM."""
        return "GEMM" if self.rows > 1 else "GEMV"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One forward of one sequence; the first is the prefill."""

    fed: tuple[int, ...]
    """Token ids that the model was given."""
    n_cached: int
    """Tokens whose keys and values were held when the step began."""
    kv_bytes: int
    """Bytes of those keys and values."""
    product: Product | None
    """The largest of the decoder layers' products with weights (the LM head has one row in any case); None for an
    architecture whose sizes are not known."""
    out: int
    """The token that was chosen."""


def trace(strategy: Strategy, prompt: Tensor, n_gen: int, stops: Collection[int | None] = ()) -> list[Step]:
    """Generate up to `n_gen` tokens after `prompt [1, n_prompt]`, or up to one of `stops`, and write each step down.

    `strategy` is prepared; it is reset first. What was fed is seen at the model's own entrance. Only a strategy that
    compiles its step is not looked into (a hook would be compiled along): what it was fed is what the step was given.
    """
    strategy.reset()
    steps: list[Step] = []
    ids = prompt
    n_before = 0
    while len(steps) < n_gen and not (steps and steps[-1].out in stops):
        kv_bytes = strategy.kv_bytes
        with _fed_to(strategy.model) if strategy.compile_s is None else nullcontext(list[Tensor]()) as seen:
            logits = strategy.decode(ids) if steps else strategy.prefill(ids)
        fed = tuple((seen or [ids])[0][0].tolist())
        product = largest_product(strategy.model.config, rows=len(fed))
        n_cached = n_before if kv_bytes else 0
        n_before += ids.shape[1]
        ids = logits.argmax(dim=-1, keepdim=True)
        steps.append(Step(fed=fed, n_cached=n_cached, kv_bytes=kv_bytes, product=product, out=int(ids)))
    return steps


def largest_product(config: Any, rows: int) -> Product | None:
    """Return the largest product of `rows` positions with the weights of a decoder layer; None where they are unknown.

    Of a mixture of experts the experts are left out: how many rows each of them gets is the router's choice.
    """
    try:
        layers = geometry(config).layers
    except UnknownGeometry:
        return None
    inner, columns = max((matrix for layer in layers for matrix in layer.linears), key=lambda size: size[0] * size[1])
    return Product(rows, inner, columns)


@contextmanager
def _fed_to(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collect the token ids `[batch, q]` of every forward of `model` inside the block."""
    seen: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["input_ids"] if "input_ids" in kwargs else args[0])

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()
