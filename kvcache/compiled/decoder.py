"""The description of a model that `compiled` runs instead of transformers' modules: its weights, and how they are used.

A description is data. The step (`kernels.py`) reads it and knows no architecture; `architectures/` has a file for each
family that says how its modules become a description. Nothing is copied: every `Linear` is a view of a parameter of
the model. Axes: `batch` sequences, `q` positions of one forward, `in` and `out` features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional

from kvcache.compiled.experts import Experts
from kvcache.compiled.kernels import Activation
from kvcache.compiled.mlp import Mlp
from kvcache.compiled.products import Linear

Rotary = tuple[Tensor, Tensor]
"""Cosine and sine of some positions, `[positions, rotated features]` each; the sine's first half has its sign turned.

A head's features beyond those are not rotated."""

RotaryTable = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""transformers' own: any tensor of the model's dtype, and positions `[1, positions]` -> cosine and sine."""

Split = Callable[[tuple[Tensor, ...], int], tuple[Tensor, Tensor, Tensor]]
"""Products `[batch, q, out]` and the features of a head -> queries, keys, values `[batch, heads, q, head_dim]`.

A function of a module, not a closure: layers of equal functions share their compiled code."""


class Norm(NamedTuple):
    """Root-mean-square norm or layer norm."""

    weight: Tensor
    """`[features]`; `[heads, 1, head_dim]` where each head has weights of its own."""
    eps: float
    bias: Tensor | None = None
    centred: bool = False
    """Layer norm: the mean is subtracted."""
    plus_one: bool = False
    """The factor is `1 + weight` (Gemma)."""
    rounds_first: bool = True
    """The normalised value is rounded to the model's dtype before it is multiplied with the weight (Llama)."""
    over: tuple[int, ...] = (-1,)
    """Axes whose mean square is taken; `(-3, -1)`: all heads together (OLMo 2)."""


class Layer(NamedTuple):
    """One block. A norm is None where the architecture has none at that place."""

    qkv: tuple[Linear, ...]
    split: Split
    """How the products of `qkv` become heads."""
    o: Linear
    mlp: Mlp | Experts
    kv_heads: int
    head_dim: int
    scale: float
    """What the attention scores are multiplied by."""
    attention_norm: Norm | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    attention_output_norm: Norm | None = None
    mlp_norm: Norm | None = None
    mlp_output_norm: Norm | None = None
    softcap: float | None = None
    """What the scores are bounded by, smoothly: `softcap * tanh(score / softcap)`."""
    rotary: int | None = None
    """Index of the rotary table; None: positions are not rotated."""
    window: int | None = None
    """How many positions are attended to, the own one included; None: all."""
    residual: float = 1.0
    """What is multiplied with both outputs before they are added to the residual stream."""
    parallel: bool = False
    """The feed-forward block reads what attention reads, not what attention has added to."""


class Head(NamedTuple):
    """What makes logits of the last layer's output."""

    norm: Norm
    linear: Linear
    divisor: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class Decoder:
    """A whole model."""

    tokens: Tensor
    """`[vocab, hidden]`"""
    layers: tuple[Layer, ...]
    head: Head
    activation: Activation
    positions: Tensor | None = None
    """Learned positions `[max_positions, hidden]`, or None."""
    rotaries: tuple[RotaryTable, ...] = ()
    """The rotary tables that layers name by their index."""
    embedding: float = 1.0
    """What embeddings are multiplied by."""
    most_sequences: int | None = None
    """The largest batch that a step is written for; None: any."""

    @property
    def head_dim(self) -> int:
        """Features of one head."""
        return self.layers[0].head_dim

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.layers[0].kv_heads

    def embed(self, ids: Tensor, at: Tensor) -> Tensor:
        """Rows of the table for `ids [batch, q]` at the positions `at [q]`: `[batch, q, hidden]`."""
        x = functional.embedding(ids, self.tokens)
        if self.embedding != 1:
            x = x * self.embedding
        return x if self.positions is None else x + self.positions[at]

    def with_kernels(self, step: Callable[[Linear], str], prompt: Callable[[Linear | Mlp], tuple[str, ...]]) -> Self:
        """Return the same model with the kernels that `step` and `prompt` say of its products.

        `prompt` returns one for each of PROMPT_ROWS, and is asked about feed-forward blocks as a whole. The head sees
        one position of a prompt, in a step.
        """

        def chosen(linear: Linear) -> Linear:
            return linear._replace(step=step(linear), prompt=prompt(linear))

        layers = tuple(
            layer._replace(
                qkv=tuple(map(chosen, layer.qkv)), o=chosen(layer.o), mlp=layer.mlp.with_kernels(step, prompt)
            )
            for layer in self.layers
        )
        head = self.head._replace(linear=self.head.linear._replace(step=step(self.head.linear)))
        return replace(self, layers=layers, head=head)

    def rotary(self, at: Tensor) -> tuple[Rotary, ...]:
        """Compute every table for the positions `at [positions]`."""
        tables = []
        for table in self.rotaries:
            cos, sin = (part[0] for part in table(self.tokens, at[None]))
            first, second = sin.chunk(2, dim=-1)
            tables.append((cos, torch.cat((-first, second), dim=-1)))
        return tuple(tables)
