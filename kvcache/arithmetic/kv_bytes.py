"""Bytes that each kind of cache allocates: scales, zero points, residual windows and padding included. No torch.

SmolLM2-135M keeps 11,520 numbers of keys and values a token (30 layers, 3 heads of 64). With 512 tokens in a context
and 32 decoded, 4-bit integers by optimum-quanto take about a fifth of float32:

>>> from types import SimpleNamespace
>>> from kvcache.arithmetic.architectures import geometry
>>> smollm2 = geometry(SimpleNamespace(model_type="llama", vocab_size=49152, hidden_size=576, num_hidden_layers=30,
...     num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536, max_position_embeddings=8192,
...     tie_word_embeddings=True))
>>> fed = Fed(batch_size=1, n_depth=0, n_prompt=512, n_steps=32, capacity=545, dtype_bytes=4)
>>> {kind: round(allocated_bytes(kind, smollm2.layers, fed) / 2**20, 1) for kind in ("dynamic", "fp8", "quanto-int4")}
{'dynamic': 23.9, 'fp8': 6.2, 'quanto-int4': 4.9}
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kvcache.arithmetic.geometry import Geometry, Layer


@dataclass(frozen=True, kw_only=True)
class Fed:
    """What a cache was made for and fed: a context and a prompt in one forward each, then one token a step."""

    batch_size: int
    n_depth: int
    n_prompt: int
    n_steps: int
    capacity: int
    """Tokens that it was made for."""
    dtype_bytes: int

    @property
    def n_tokens(self) -> int:
        """Tokens fed, per sequence."""
        return self.n_depth + self.n_prompt + self.n_steps


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes of a cache: those that belong to tokens, states included, and every one that is allocated."""

    used: int
    allocated: int


Row = Callable[[Layer, Fed], float]
"""Bytes of the keys (or the values) of one layer."""


def allocated_bytes(kind: str, layers: Sequence[Layer], fed: Fed) -> int | None:
    """Predict every byte that a cache of `kind` holds; None for a kind that is not written down (the user's own)."""
    row = ALLOCATED.get(kind)
    return None if row is None else round(sum(2 * layer.count * row(layer, fed) for layer in layers))


def used_bytes(kind: str, layers: Sequence[Layer], fed: Fed) -> int | None:
    """Predict the bytes that belong to tokens: without a static cache's padding, and that of whole chunks.

    None for a kind that is not written down.
    """
    row = _USED.get(kind) or ALLOCATED.get(kind)
    return None if row is None else round(sum(2 * layer.count * row(layer, fed) for layer in layers))


def attended(kind: str, geometry: Geometry) -> Geometry:
    """Return the geometry with the windows that an evicting `kind` gives to every layer; unchanged for another."""
    kept = KEPT_TOKENS.get(kind)
    if kept is None:
        return geometry
    # A forward sees what was kept beside its own tokens; a sliding layer keeps one token less than its window.
    return replace(geometry, layers=tuple(replace(layer, window=kept + 1) for layer in geometry.layers))


KEPT_TOKENS = {"sink-window": 256}
"""Tokens that a kind holds at most after a forward."""


def _growing(layer: Layer, fed: Fed) -> float:
    """Count for a sliding window, a view that keeps the forward's whole tensor, window - 1 rows and those just fed."""
    last = 1 if fed.n_steps else fed.n_prompt
    before = fed.n_tokens - last
    if layer.window is None:
        return fed.n_tokens * _numbers(layer, fed) * fed.dtype_bytes
    held = min(before, layer.window - 1) + last
    return held * _numbers(layer, fed) * fed.dtype_bytes + 4  # half of the window's length, a tensor


def _static(layer: Layer, fed: Fed) -> float:
    length = fed.capacity if layer.window is None else min(layer.window, fed.capacity)
    return length * _numbers(layer, fed) * fed.dtype_bytes + 4  # half of a layer's count of tokens, a tensor


def _fp8(layer: Layer, fed: Fed) -> float:
    """Count a byte a number, and a 16-bit scale per token and head."""
    return fed.n_tokens * fed.batch_size * layer.kv_heads * (layer.head_dim + 2)


def _sink_window(layer: Layer, fed: Fed) -> float:
    return min(fed.n_tokens, KEPT_TOKENS["sink-window"]) * _numbers(layer, fed) * fed.dtype_bytes


def _chunked(bytes_of_head: Callable[[Layer, Fed], float]) -> Row:
    """Count chunks of 64 positions for the whole capacity, at least three; `bytes_of_head` of one token and head."""

    def row(layer: Layer, fed: Fed) -> float:
        positions = 64 * max(3, -(-fed.capacity // 64))
        return positions * fed.batch_size * layer.kv_heads * bytes_of_head(layer, fed)

    return row


def _int4_head(layer: Layer, _fed: Fed) -> float:
    """Count half a byte a feature and a 16-bit scale, and half of what keys have more: values have none of it.

    That is a 16-bit share of the first key, and three numbers of 16 bits a feature for each chunk of 64 positions.
    """
    return layer.head_dim / 2 + 2 + (2 + 3 * 2 * layer.head_dim / 64) / 2


def _grouped(bytes_of_codes: Callable[[int], int]) -> Row:
    """Count groups of 64 codes with a scale and a zero point each, beside recent tokens in full width."""

    def row(layer: Layer, fed: Fed) -> float:
        exact = _exact_tokens(fed)
        groups = (fed.n_tokens - exact) * _numbers(layer, fed) // 64
        return bytes_of_codes(groups) + (2 * groups + exact * _numbers(layer, fed)) * fed.dtype_bytes

    return row


def _exact_tokens(fed: Fed) -> int:
    """Tokens that are not quantised yet: the first forward is at once, later ones when 128 have gathered."""
    later = 0 if fed.n_depth == 0 or fed.n_prompt >= 128 else fed.n_prompt
    return (later + fed.n_steps) % 128


def _numbers(layer: Layer, fed: Fed) -> int:
    """Numbers in the keys of one token, over the batch."""
    return fed.batch_size * layer.kv_heads * layer.head_dim


def _int8_head(layer: Layer, _fed: Fed) -> float:
    return layer.head_dim + 2


def _full_head(layer: Layer, fed: Fed) -> float:
    return layer.head_dim * fed.dtype_bytes


def _rows(bytes_of_head: Callable[[Layer, Fed], float], *, beside_own: int = 1) -> Row:
    """Count the rows of the tokens that a layer keeps: all, or those of its window but for `beside_own` of them."""

    def row(layer: Layer, fed: Fed) -> float:
        held = fed.n_tokens if layer.window is None else min(fed.n_tokens, layer.window - beside_own)
        return held * fed.batch_size * layer.kv_heads * bytes_of_head(layer, fed)

    return row


_USED: dict[str, Row] = {
    **dict.fromkeys(("dynamic", "hf-generate", "offloaded"), _rows(_full_head)),
    "static": _rows(_full_head, beside_own=0),
    "compiled": _rows(_full_head),
    "compiled-int8": _rows(_int8_head),
    "compiled-int4": _rows(_int4_head),
}
"""Kind -> its row without padding, where that differs from what is allocated."""

ALLOCATED: dict[str, Row] = {
    "naive": lambda _layer, _fed: 0.0,
    "dynamic": _growing,
    "hf-generate": _growing,
    "offloaded": _growing,
    "static": _static,
    "compiled": _chunked(_full_head),
    "compiled-int8": _chunked(_int8_head),
    "compiled-int4": _chunked(_int4_head),
    "fp8": _fp8,
    "sink-window": _sink_window,
    # optimum-quanto packs two or four rows of 64 codes into one.
    "quanto-int4": _grouped(lambda groups: -(-groups // 2) * 64),
    "quanto-int2": _grouped(lambda groups: -(-groups // 4) * 64),
    # HQQ packs codes of a group; of 3 bits ten to an int32.
    "hqq-int8": _grouped(lambda groups: groups * 64),
    "hqq-int4": _grouped(lambda groups: groups * 32),
    "hqq-int3": _grouped(lambda groups: groups * 4 * 7),
    "hqq-int2": _grouped(lambda groups: groups * 16),
    "hqq-int1": _grouped(lambda groups: groups * 8),
}
"""Kind -> its row."""
