"""transformers' offloaded cache: keys and values wait in main memory, and only the layer at work is on the GPU."""

from transformers import Cache, DynamicCache

from kvcache.caches.contract import Unsupported
from kvcache.caches.dynamic import DynamicKV


class OffloadedKV(DynamicKV):
    """Grows as `dynamic` does; the next layer is fetched while this one computes."""

    def _empty(self) -> Cache:
        self._marked = []
        if self.device.type != "cuda":
            raise Unsupported("offloaded moves a cache between a GPU and main memory; this model is not on a GPU")
        return DynamicCache(config=self.config, offloading=True)
