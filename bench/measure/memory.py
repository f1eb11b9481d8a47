"""What a strategy takes beyond the weights: the peak of an untimed pass, and what it holds while its cache is full.

The first pass of a process allocates much that is no part of a strategy: threads' stacks, buffers of libraries, pages
of the weights' file, a compiler's tables. So this is a later pass, in which nothing but the strategy's own is new. The
context is fed as a part of the prompt, since a state to come back to would be a second cache.
"""

from typing import NamedTuple

from torch import Tensor

from bench.machine.devices import Device
from bench.record import outgrows
from kvcache.strategies.strategy import Strategy


class Weight(NamedTuple):
    """Memory in bytes; None where the system does not say."""

    peak: int | None
    """Most resident memory, mapped weights included; on CUDA the allocator's."""
    beyond_weights: int | None
    """Most memory beyond what was held before: cache and workspace."""
    growth: int | None
    """What is held beyond that at the end: the cache, and whatever else the strategy keeps."""


def weigh(strategy: Strategy, device: Device, ids: Tensor, forced: Tensor, steps: list[int] | None) -> Weight:
    """Weigh one generation after `ids [batch, n_depth + n_prompt]`; the strategy must be prepared anew afterwards.

    `forced [batch, n_gen]` are the tokens to feed, `steps` those to compute (`Strategy.generate`). Where more is held
    than the cache explains, the pass is repeated, and what was held less often is no cache: at the first prompt of a
    length libraries make buffers that they keep (5.3 MB beside the 26.5 of `compiled` after 513 tokens; 0.4 the next
    time).
    """
    found = _weigh_once(strategy, device, ids, forced, steps)
    if found.growth is None or not outgrows(found.growth, strategy.kv_bytes_allocated):
        return found
    again = _weigh_once(strategy, device, ids, forced, steps)
    return found if again.growth is None or found.growth <= again.growth else again


def _weigh_once(strategy: Strategy, device: Device, ids: Tensor, forced: Tensor, steps: list[int] | None) -> Weight:
    strategy.release()
    device.give_back_memory()
    has_peak = device.reset_peak_memory()
    before = device.held_memory_bytes()
    batch_size, n_ids = ids.shape
    n_gen = forced.shape[1]
    strategy.prepare(batch_size, n_ids + n_gen, prompt_length=n_ids)
    strategy.generate(ids, n_gen, forced=forced, steps=steps)
    peak, most = (device.peak_memory_bytes(), device.peak_held_bytes()) if has_peak else (None, None)
    device.give_back_memory()
    return Weight(peak, _beyond(most, before), _beyond(device.held_memory_bytes(), before))


def _beyond(size: int | None, before: int | None) -> int | None:
    return None if size is None or before is None else max(0, size - before)
