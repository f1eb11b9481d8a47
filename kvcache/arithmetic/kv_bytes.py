"""Bytes that each kind of cache allocates: scales, zero points, residual windows and padding included. No torch.

SmolLM2-135M keeps 11,520 numbers of keys and values a token (30 layers, 3 heads of 64). With 512 tokens in a context
and 32 decoded, 4-bit integers by optimum-quanto take about a fifth of float32:

>>> from types import SimpleNamespace
>>> from kvcache.arithmetic.architectures import geometry
>>> smollm2 = geometry(SimpleNamespace(model_type="llama", vocab_size=49152, hidden_size=576, num_hidden_layers=30,
...     num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536, max_position_embeddings=8192,
...     tie_word_embeddings=True))
>>> fed = Fed(batch_size=1, n_depth=0, n_prompt=512, n_steps=32, capacity=545, dtype_bytes=4)
>>> QUANTO_INT4 = grouped(64, packed=2)
>>> [round(formula.held(smollm2.layers, fed).allocated / 2**20, 1) for formula in (GROWING, FP8, QUANTO_INT4)]
[23.9, 6.2, 4.9]
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


@dataclass(frozen=True)
class Formula:
    """What a kind of cache holds, scales, zero points, residual windows and padding included."""

    allocated: Row
    used: Row | None = None
    """Without padding, and that of whole chunks, where that differs."""
    kept_tokens: int | None = None
    """Tokens that the kind holds at most after a forward, if it evicts."""

    def held(self, layers: Sequence[Layer], fed: Fed) -> Held:
        """Predict the bytes of a cache of these layers."""
        rows = (self.used or self.allocated, self.allocated)
        used, allocated = (round(sum(2 * layer.count * row(layer, fed) for layer in layers)) for row in rows)
        return Held(used=used, allocated=allocated)

    def attended(self, geometry: Geometry) -> Geometry:
        """Return the geometry with the windows that a kind that evicts gives to every layer."""
        assert self.kept_tokens is not None
        # A forward sees what was kept beside its own tokens; a sliding layer keeps one token less than its window.
        window = self.kept_tokens + 1
        return replace(geometry, layers=tuple(replace(layer, window=window) for layer in geometry.layers))


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


def evicting(kept_tokens: int) -> Formula:
    """Count the last tokens in full width, so many of them."""
    return Formula(
        lambda layer, fed: min(fed.n_tokens, kept_tokens) * _numbers(layer, fed) * fed.dtype_bytes,
        kept_tokens=kept_tokens,
    )


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


def grouped(bytes_of_codes: int, packed: int) -> Formula:
    """Count groups of 64 codes with a scale and a zero point each, beside recent tokens in full width."""

    def row(layer: Layer, fed: Fed) -> float:
        exact = _exact_tokens(fed)
        groups = (fed.n_tokens - exact) * _numbers(layer, fed) // 64
        return -(-groups // packed) * bytes_of_codes + (2 * groups + exact * _numbers(layer, fed)) * fed.dtype_bytes

    return Formula(row)


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


def _in_chunks(bytes_of_head: Callable[[Layer, Fed], float]) -> Formula:
    return Formula(_chunked(bytes_of_head), _rows(bytes_of_head))


NOTHING = Formula(lambda _layer, _fed: 0.0)
GROWING = Formula(_growing, _rows(_full_head))
STATIC = Formula(_static, _rows(_full_head, beside_own=0))
CHUNKS, INT8_CHUNKS, INT4_CHUNKS = map(_in_chunks, (_full_head, _int8_head, _int4_head))
FP8 = Formula(_fp8)
