"""How the parts that architectures share are read: linear layers, norms, activations, rotary tables, windows."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import GELUTanh, NewGELUActivation, SiLUActivation

from kvcache.caches.contract import Unsupported
from kvcache.compiled.decoder import Norm, RotaryTable
from kvcache.compiled.kernels import Activation
from kvcache.compiled.mlp import Mlp
from kvcache.compiled.products import Linear
from kvcache.models.rotary import changes_with_length


def linear(module: nn.Linear) -> Linear:
    """Read a plain linear layer.

    Raises:
        Unsupported: it is a subclass, which may compute something else (quantised, adapted).
    """
    if type(module) is not nn.Linear:
        raise Unsupported(f"compiled reads plain linear layers; this model has a {type(module).__name__}")
    return Linear(module.weight, module.bias)


def rows(whole: Linear, *sizes: int) -> tuple[Linear, ...]:
    """Divide a fused layer's output features into parts of these sizes; each is a view."""
    biases = (None,) * len(sizes) if whole.bias is None else whole.bias.split(sizes)
    return tuple(Linear(weight, bias) for weight, bias in zip(whole.weight.split(sizes), biases, strict=True))


def gated(mlp: Any) -> Mlp:
    """Read a feed-forward block of three layers under Llama's names."""
    return Mlp(gate=linear(mlp.gate_proj), up=linear(mlp.up_proj), down=linear(mlp.down_proj))


def projections(attention: Any) -> tuple[Linear, ...]:
    """Read those of queries, keys and values under Llama's names."""
    return tuple(linear(part) for part in (attention.q_proj, attention.k_proj, attention.v_proj))


def separate(products: tuple[Tensor, ...], head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut queries, keys and values, each a product of its own, into heads."""
    q, k, v = (part.unflatten(-1, (-1, head_dim)).transpose(1, 2) for part in products)
    return q, k, v


def interleaved(products: tuple[Tensor, ...], head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut one product, in which each head's queries, keys and values are neighbours, into heads."""
    (whole,) = products
    q, k, v = whole.unflatten(-1, (-1, 3 * head_dim)).transpose(1, 2).chunk(3, dim=-1)
    return q, k, v


def rms_norm(module: Any) -> Norm:
    """Read a root-mean-square norm as Llama and most others compute it."""
    return Norm(module.weight, module.variance_epsilon)


def layer_norm(module: nn.LayerNorm) -> Norm:
    """Read torch's layer norm."""
    return Norm(module.weight, module.eps, module.bias, centred=True)


def activation(module: nn.Module) -> Activation:
    """Compute what `module` does, in one pass where transformers takes eight (GPT-2), or in place (SiLU)."""
    if type(module) in (NewGELUActivation, GELUTanh):
        return functools.partial(functional.gelu, approximate="tanh")
    if type(module) in (SiLUActivation, nn.SiLU):
        return functools.partial(functional.silu, inplace=True)
    return module


def rotary_table(module: Any, layer_type: str | None = None) -> RotaryTable:
    """Read a rotary embedding, or the table of one layer type where a model has several.

    Raises:
        Unsupported: its frequencies change with the length that is fed.
    """
    rope_type = module.rope_type if layer_type is None else module.rope_type[layer_type]
    if changes_with_length(rope_type):
        raise Unsupported(f"compiled has no rotary positions of type {rope_type}, which change with the length")
    return module if layer_type is None else functools.partial(module, layer_type=layer_type)


def windows(config: Any) -> list[int | None]:
    """Return each layer's window, where the config lists the layers' types; None: all positions."""
    return [config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types]
