"""Geometry of each architecture, read from its transformers config by attribute access: no torch, no transformers.

What an architecture holds was read in the modelling code of transformers 5.23; tests compare the parameters, and the
products that run, with what is said here.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from kvcache.arithmetic.geometry import Experts, Geometry, Layer, Matrix


class UnknownGeometry(ValueError):
    """Nothing certain can be said of this architecture's sizes; the message is the reason, in one line."""


def geometry(config: Any) -> Geometry:
    """Read the sizes that `config` (of a causal language model, as transformers reads it) stands for.

    An architecture that is not known by name is taken for Llama's block (four attention linears, three of a gated
    feed-forward, two norms) if it has the standard names and `silu`, which the gated form goes with, and nothing that
    block lacks. The guess can be checked: `costs.parameters` must equal the model's own count.

    Raises:
        UnknownGeometry: an attribute is missing, or the architecture computes something not described here.

    >>> from types import SimpleNamespace
    >>> config = SimpleNamespace(model_type="gpt2", vocab_size=50257, hidden_size=768, num_hidden_layers=12,
    ...     num_attention_heads=12, n_inner=None, max_position_embeddings=1024, tie_word_embeddings=True)
    >>> geometry(config).layers[0].linears
    ((768, 2304), (768, 768), (768, 3072), (3072, 768))
    >>> geometry(SimpleNamespace(model_type="mamba", hidden_size=768, hidden_act="silu"))
    Traceback (most recent call last):
    kvcache.arithmetic.architectures.UnknownGeometry: mamba: its config has no num_attention_heads
    """
    config = getattr(config, "text_config", None) or config
    model_type = getattr(config, "model_type", None) or type(config).__name__
    if getattr(config, "is_heterogeneous", False):  # transformers' overrides for single layers, of any attribute
        raise UnknownGeometry(f"{model_type}: its layers differ (per_layer_config)")
    try:
        return _READERS.get(model_type, _unnamed)(config)
    except UnknownGeometry as reason:
        raise UnknownGeometry(f"{model_type}: {reason}") from None
    except AttributeError as error:
        raise UnknownGeometry(f"{model_type}: its config has no {error.name}") from None


def _gpt2(config: Any) -> Geometry:
    hidden = config.hidden_size
    inner = config.n_inner or 4 * hidden
    linears = ((hidden, 3 * hidden), (hidden, hidden), (hidden, inner), (inner, hidden))
    layer = _classic(config, linears, _outputs(linears) + 4 * hidden)
    return _model(config, [layer], vectors=2 * hidden, position_rows=config.max_position_embeddings)


def _opt(config: Any) -> Geometry:
    hidden, inner, embedding = config.hidden_size, config.ffn_dim, config.word_embed_proj_dim
    linears = (*[(hidden, hidden)] * 4, (hidden, inner), (inner, hidden))
    norm = 2 * hidden if config.layer_norm_elementwise_affine else 0
    layer = _classic(config, linears, (_outputs(linears) if config.enable_bias else 0) + 2 * norm)
    has_final_norm = config.do_layer_norm_before and not config._remove_final_layer_norm  # noqa: SLF001  # its public name
    return _model(
        config,
        [layer],
        embedding_size=embedding,
        linears=((embedding, hidden), (hidden, embedding)) if embedding != hidden else (),
        vectors=norm if has_final_norm else 0,
        position_rows=config.max_position_embeddings + 2,  # OPT's positions start at row 2
    )


def _gpt_neox(config: Any) -> Geometry:
    hidden, inner = config.hidden_size, config.intermediate_size
    attention, feed_forward = ((hidden, 3 * hidden), (hidden, hidden)), ((hidden, inner), (inner, hidden))
    biases = _outputs(feed_forward) + (_outputs(attention) if config.attention_bias else 0)
    return _model(config, [_classic(config, attention + feed_forward, biases + 4 * hidden)], vectors=2 * hidden)


def _bloom(config: Any) -> Geometry:
    hidden = config.hidden_size
    linears = ((hidden, 3 * hidden), (hidden, hidden), (hidden, 4 * hidden), (4 * hidden, hidden))
    layer = _classic(config, linears, _outputs(linears) + 4 * hidden)
    return _model(config, [layer], vectors=4 * hidden, max_positions=None)


def _falcon(config: Any) -> Geometry:
    hidden, heads, inner = config.hidden_size, config.num_attention_heads, config.ffn_hidden_size
    head_dim = hidden // heads
    if config.new_decoder_architecture:  # grouped in the weights, but repeated to all heads before the cache
        qkv, kv_heads = hidden + 2 * config.num_kv_heads * head_dim, heads
    else:
        kv_heads = 1 if config.multi_query else heads
        qkv = hidden + 2 * kv_heads * head_dim
    linears = ((hidden, qkv), (hidden, hidden), (hidden, inner), (inner, hidden))
    norms_if_parallel = config.num_ln_in_parallel_attn or (2 if config.new_decoder_architecture else 1)
    norms = 2 if not config.parallel_attn or norms_if_parallel == 2 else 1
    layer = _classic(config, linears, (_outputs(linears) if config.bias else 0) + norms * 2 * hidden)
    max_positions = None if config.alibi else config.max_position_embeddings
    layers = [replace(layer, kv_heads=kv_heads)]
    return _model(config, layers, vectors=2 * hidden, max_positions=max_positions)


def _phi(config: Any) -> Geometry:
    hidden, inner, head_dim = config.hidden_size, config.intermediate_size, _head_dim(config)
    linears = (*_attention(config), (hidden, inner), (inner, hidden))
    head_norms = 4 * head_dim if config.qk_layernorm else 0
    layer = _classic(config, linears, _outputs(linears) + head_norms + 2 * hidden)
    layers = [replace(layer, kv_heads=_kv_heads(config))]
    return _model(config, layers, vectors=2 * hidden + config.vocab_size)  # the LM head has a bias


def _gated(config: Any, *, qkv_bias: bool = False, head_norms: bool = False, norms: int = 2) -> Geometry:
    """Describe Llama and its descendants: RMS norms, separate or fused query, key and value, gated feed-forward."""
    hidden, head_dim = config.hidden_size, _head_dim(config)
    attention, dense = _attention(config), _gate_up_down(hidden, config.intermediate_size)
    vectors = norms * hidden + (2 * head_dim if head_norms else 0)
    if getattr(config, "attention_bias", False):
        vectors += _outputs(attention)
    elif qkv_bias:
        vectors += _outputs(attention[:3])
    mlp_biases = _outputs(dense) if getattr(config, "mlp_bias", False) else 0
    layers = []
    for index, window in enumerate(_windows(config)):
        experts = _experts(config, index)
        router_or_dense = dense if experts is None else ((hidden, experts.count),)
        layers.append(
            Layer(
                heads=config.num_attention_heads,
                kv_heads=_kv_heads(config),
                head_dim=head_dim,
                window=window,
                linears=(*attention, *router_or_dense),
                vectors=vectors + (mlp_biases if experts is None else 0),
                experts=experts,
            )
        )
    return _model(config, layers, vectors=hidden)


def _unnamed(config: Any) -> Geometry:
    if config.hidden_act != "silu":
        raise UnknownGeometry("an architecture not known by name; hidden_act is not silu, so not of Llama's gated form")
    foreign = [name for name in _NOT_IN_LLAMA if getattr(config, name, None)]
    if foreign:
        raise UnknownGeometry(f"an architecture not known by name, with {', '.join(foreign)}")
    return _gated(config)


_READERS: dict[str, Callable[[Any], Geometry]] = {
    "gpt2": _gpt2,
    "opt": _opt,
    "gpt_neox": _gpt_neox,
    "bloom": _bloom,
    "falcon": _falcon,
    "phi": _phi,
    **dict.fromkeys(("llama", "mistral", "mixtral", "phi3", "gemma"), _gated),
    "qwen2": lambda config: _gated(config, qkv_bias=True),
    **dict.fromkeys(("qwen3", "qwen3_moe"), lambda config: _gated(config, head_norms=True)),
    "gemma2": lambda config: _gated(config, norms=4),
    "gemma3_text": lambda config: _gated(config, head_norms=True, norms=4),
}

_NOT_IN_LLAMA = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "kv_lora_rank",
    "num_kv_shared_layers",
    "mamba_d_state",
    "linear_num_key_heads",
    "is_encoder_decoder",
)
"""Attributes of architectures that compute something else than Llama's block."""


def _model(config: Any, layers: Iterable[Layer], *, vectors: int, **others: Any) -> Geometry:
    """Add the parts in common; equal layers are counted together, so that arithmetic over them is short."""
    sizes: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "embedding_size": config.hidden_size,
        "tied": bool(config.tie_word_embeddings),
        **others,
    }
    if "max_positions" not in sizes:
        sizes["max_positions"] = config.max_position_embeddings
    kinds = tuple(replace(kind, count=n * kind.count) for kind, n in Counter(layers).items())
    return Geometry(layers=kinds, vectors=vectors, **sizes)


def _classic(config: Any, linears: tuple[Matrix, ...], vectors: int) -> Layer:
    """Describe all layers of a model whose layers are equal, with one key head per query head and no window."""
    heads = config.num_attention_heads
    head_dim = config.hidden_size // heads
    count = config.num_hidden_layers
    return Layer(count=count, heads=heads, kv_heads=heads, head_dim=head_dim, linears=linears, vectors=vectors)


def _attention(config: Any) -> tuple[Matrix, ...]:
    """List query, key, value and output, with grouped keys."""
    hidden, head_dim = config.hidden_size, _head_dim(config)
    queries, keys = config.num_attention_heads * head_dim, _kv_heads(config) * head_dim
    return ((hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden))


def _gate_up_down(hidden: int, inner: int) -> tuple[Matrix, ...]:
    return ((hidden, inner), (hidden, inner), (inner, hidden))


def _experts(config: Any, index: int) -> Experts | None:
    """Describe the experts of layer `index`; None where it is dense."""
    if config.model_type == "mixtral":
        count, inner = config.num_local_experts, config.intermediate_size
    elif config.model_type == "qwen3_moe" and index not in config.mlp_only_layers:
        count, inner = config.num_experts, config.moe_intermediate_size
        if count == 0 or (index + 1) % config.decoder_sparse_step:
            return None
    else:
        return None
    linears = _gate_up_down(config.hidden_size, inner)
    return Experts(count=count, per_token=config.num_experts_per_tok, linears=linears)


def _windows(config: Any) -> list[int | None]:
    """List the sliding window of each layer, by the rule of transformers' caches (`get_layer_types_and_kwargs`)."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    other = set(kinds or ()) - {"full_attention", "sliding_attention"}
    if other:
        raise UnknownGeometry(f"layers of type {', '.join(sorted(other))}")
    windows = [window if kind == "sliding_attention" else None for kind in kinds or ()]
    windows = windows or [window] * config.num_hidden_layers
    if any(windows) and config.model_type not in _SLIDING:  # a cache slides by the config, and attention may not
        raise UnknownGeometry("a window in the config of a model whose attention is not known to have one")
    if 1 in windows:
        raise UnknownGeometry("a window of one token, with which transformers' cache drops none")
    return windows


_SLIDING = frozenset(("mistral", "mixtral", "phi3", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text"))
"""Model types whose attention has the window that the config names."""


def _kv_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _outputs(linears: Iterable[Matrix]) -> int:
    """Count one bias for each output feature."""
    return sum(n_out for _, n_out in linears)
