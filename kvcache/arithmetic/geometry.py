"""A model's sizes as plain numbers: all that the arithmetic of costs.py needs. architectures.py fills them in."""

from collections.abc import Iterator
from dataclasses import dataclass

Matrix = tuple[int, int]
"""A linear layer's weights: (features in, features out)."""


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The mixture of experts of a layer: each token passes through `per_token` of `count` equal experts."""

    count: int
    per_token: int
    linears: tuple[Matrix, ...]
    """Of one expert."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """`count` equal decoder layers."""

    count: int = 1
    heads: int
    kv_heads: int
    """Heads that the cache stores; `heads` is a multiple of it."""
    head_dim: int
    """Of queries, keys and values alike."""
    window: int | None = None
    """A token sees itself and the `window` - 1 tokens before it; None: all."""
    linears: tuple[Matrix, ...]
    """Those that every token passes, a router included; fused ones and their parts are the same arithmetic."""
    vectors: int
    """Numbers in biases and norms."""
    experts: Experts | None = None


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """A decoder-only language model in numbers; counts of numbers, not bytes."""

    vocab_size: int
    hidden_size: int
    embedding_size: int
    """Width of the token table and of the LM head's input: `hidden_size` but for OPT's projections."""
    layers: tuple[Layer, ...]
    linears: tuple[Matrix, ...] = ()
    """Linear layers outside the decoder layers that every token passes; the LM head is not among them."""
    vectors: int
    """Numbers in biases and norms outside the decoder layers."""
    position_rows: int = 0
    """Rows of a learned position table, each `hidden_size` wide; 0: there is none."""
    tied: bool
    """The LM head and the token table are one matrix."""
    max_positions: int | None
    """Longest sequence; None: no limit (ALiBi)."""

    @property
    def every_linear(self) -> Iterator[Matrix]:
        """The linear layers of one decoder layer of each kind, its experts' included, and those outside of them."""
        yield from self.linears
        for layer in self.layers:
            yield from layer.linears
            yield from () if layer.experts is None else layer.experts.linears
