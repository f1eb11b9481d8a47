"""One decoder for four architectures, over transformers' own weights: what `compiled` runs instead of the modules.

Nothing is copied: every `Linear` is a view of a parameter of the model. Axes: `batch` sequences, `q` positions of one
forward, `n` positions of the cache, `in` and `out` features.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation, SiLUActivation
from transformers.pytorch_utils import Conv1D

from kvcache.caches.contract import Unsupported
from kvcache.compiled.pages import leave_pages

Activation = Callable[[Tensor], Tensor]
"""It may write its result over its argument."""

Rotary = tuple[Tensor, Tensor]
"""Cosine and sine of some positions, `[positions, head_dim]` each; the sine's first half has its sign turned."""


class Linear(NamedTuple):
    """`weight [out, in]`, `bias [out]` or None."""

    weight: Tensor
    bias: Tensor | None = None


class Norm(NamedTuple):
    """Root-mean-square norm, or layer norm if there is a bias."""

    weight: Tensor
    bias: Tensor | None
    eps: float


class Layer(NamedTuple):
    """Weights of one block; `gate` and the norms of queries and keys are None where the architecture has none."""

    attention_norm: Norm
    q: Linear
    k: Linear
    v: Linear
    q_norm: Norm | None
    k_norm: Norm | None
    o: Linear
    mlp_norm: Norm
    gate: Linear | None
    up: Linear
    down: Linear
    head_dim: int
    scale: float
    """What the attention scores are multiplied by."""
    window: int | None
    """How many positions are attended to, the own one included; None: all."""


@dataclass(frozen=True)
class Decoder:
    """A whole model: weights, sizes and the few things in which the architectures differ."""

    tokens: Tensor
    """`[vocab, hidden]`"""
    positions: Tensor | None
    """Learned positions `[max_positions, hidden]`, or None: rotary."""
    layers: tuple[Layer, ...]
    norm: Norm
    head: Linear
    activation: Activation
    rotary_embedding: nn.Module | None

    @property
    def head_dim(self) -> int:
        """Features of one head."""
        return self.layers[0].head_dim

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.layers[0].k.weight.shape[0] // self.head_dim

    def embed(self, ids: Tensor, at: Tensor) -> Tensor:
        """Rows of the table for `ids [batch, q]` at the positions `at [q]`: `[batch, q, hidden]`."""
        x = functional.embedding(ids, self.tokens)
        return x if self.positions is None else x + self.positions[at]

    def rotary(self, at: Tensor) -> Rotary | None:
        """For the positions `at [positions]`; None where positions are learned."""
        if self.rotary_embedding is None:
            return None
        cos, sin = (table[0] for table in self.rotary_embedding(self.tokens, at[None]))
        first, second = sin.chunk(2, dim=-1)
        return cos, torch.cat((-first, second), dim=-1)


def decoder(model: PreTrainedModel) -> Decoder:
    """Describe `model`, whose weights stay where they are.

    Raises:
        Unsupported: the architecture, or something in its config, is not one of those written down here.
    """
    name = type(model).__name__
    if name not in _READERS or not type(model).__module__.startswith("transformers."):
        raise Unsupported(
            f"compiled runs transformers' {', '.join(_READERS)}; this model is a {type(model).__module__}.{name}"
        )
    if model.dtype not in (torch.float32, torch.bfloat16) and model.device.type != "cuda":
        raise Unsupported(f"compiled runs float32 and bfloat16 on the CPU; this model is {model.dtype}")
    return _READERS[name](model)


def _gpt2(model: Any) -> Decoder:
    config, body = model.config, model.transformer
    if config.add_cross_attention:
        raise Unsupported("compiled has no cross-attention; this GPT-2 is configured with it")
    layers = []
    for block in body.h:
        q, k, v = _rows(_conv(block.attn.c_attn), 3)
        layers.append(
            Layer(
                attention_norm=_norm(block.ln_1),
                q=q,
                k=k,
                v=v,
                q_norm=None,
                k_norm=None,
                o=_conv(block.attn.c_proj),
                mlp_norm=_norm(block.ln_2),
                gate=None,
                up=_conv(block.mlp.c_fc),
                down=_conv(block.mlp.c_proj),
                head_dim=block.attn.head_dim,
                scale=block.attn.scaling,
                window=None,
            )
        )
    return Decoder(
        tokens=body.wte.weight,
        positions=body.wpe.weight,
        layers=tuple(layers),
        norm=_norm(body.ln_f),
        head=_linear(model.lm_head),
        activation=_activation(body.h[0].mlp.act),
        rotary_embedding=None,
    )


def _llama(model: Any) -> Decoder:
    """Llama, Mistral (a sliding window) and Qwen3 (norms of queries and keys; a window in some layers)."""
    config, body = model.config, model.model
    rope_type = body.rotary_emb.rope_type
    if rope_type in ("dynamic", "longrope"):
        raise Unsupported(f"compiled has no rotary positions of type {rope_type}, which change with the length")
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * len(body.layers)
    layers = []
    for block, kind in zip(body.layers, kinds, strict=True):
        attention, mlp = block.self_attn, block.mlp
        layers.append(
            Layer(
                attention_norm=_norm(block.input_layernorm),
                q=_linear(attention.q_proj),
                k=_linear(attention.k_proj),
                v=_linear(attention.v_proj),
                q_norm=_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
                k_norm=_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
                o=_linear(attention.o_proj),
                mlp_norm=_norm(block.post_attention_layernorm),
                gate=_linear(mlp.gate_proj),
                up=_linear(mlp.up_proj),
                down=_linear(mlp.down_proj),
                head_dim=attention.head_dim,
                scale=attention.scaling,
                window=window if kind == "sliding_attention" else None,
            )
        )
    return Decoder(
        tokens=body.embed_tokens.weight,
        positions=None,
        layers=tuple(layers),
        norm=_norm(body.norm),
        head=_linear(model.lm_head),
        activation=_activation(body.layers[0].mlp.act_fn),
        rotary_embedding=body.rotary_emb,
    )


_READERS: dict[str, Callable[[PreTrainedModel], Decoder]] = {
    "GPT2LMHeadModel": _gpt2,
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _llama,
    "Qwen3ForCausalLM": _llama,
}


def _activation(module: nn.Module) -> Activation:
    """Compute what `module` does, in one pass where transformers takes eight (GPT-2), or in place (SiLU)."""
    if type(module) is NewGELUActivation:
        return functools.partial(functional.gelu, approximate="tanh")
    if type(module) in (SiLUActivation, nn.SiLU):
        return functools.partial(functional.silu, inplace=True)
    return module


def _norm(module: Any) -> Norm:
    if isinstance(module, nn.LayerNorm):
        return Norm(module.weight, module.bias, module.eps)
    return Norm(module.weight, None, module.variance_epsilon)


def _linear(module: nn.Linear) -> Linear:
    if type(module) is not nn.Linear:
        raise Unsupported(f"compiled reads plain linear layers; this model has a {type(module).__name__}")
    return Linear(module.weight, module.bias)


def _conv(module: Conv1D) -> Linear:
    """GPT-2 keeps `[in, out]`: its parameter is laid out anew so that a row of `[out, in]` is contiguous.

    A sum over the outer axis reads at 13 GB/s where one over the inner axis reads at 48. The model keeps its values and
    stays usable.
    """
    if type(module) is not Conv1D:
        raise Unsupported(f"compiled reads plain linear layers; this model has a {type(module).__name__}")
    original = module.weight.data
    transposed = original.t().contiguous()
    module.weight.data = transposed.t()
    leave_pages(original)
    return Linear(transposed, module.bias)


def _rows(linear: Linear, n: int) -> list[Linear]:
    biases = (None,) * n if linear.bias is None else linear.bias.chunk(n)
    return [Linear(weight, bias) for weight, bias in zip(linear.weight.chunk(n), biases, strict=True)]
