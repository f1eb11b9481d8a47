"""The exact counts of one phase, as they are stored and compared. Needs no torch."""

import msgspec


class Counters(msgspec.Struct, frozen=True, kw_only=True):
    """Exact counts of one phase, over the whole batch: the same on any machine, whatever it is busy with."""

    steps: int
    """Decode steps that were counted (the first ones, of naive those that are timed); 0 for prefill."""
    forward_calls: int
    tokens_processed: int
    gemm_flops: int
    gemv_flops: int
    kv_bytes: int
    """Keys and values held after the last counted step."""
    cache_growth_bytes: int
    """Keys and values copied again because rows were appended by concatenation."""
    copied_bytes: int
    """Written by every operation that only moves data, the growth of a cache among them."""
    lm_head_positions: int
    """Positions that the LM head was computed for."""
    compiled_graphs: int = 0
    recompilations: int = 0
    """Of torch.compile, over the whole phase; 0 for a strategy that compiles nothing."""
