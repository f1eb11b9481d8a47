"""transformers' default cache: it grows by concatenation, one row a step."""

from collections.abc import Callable
from typing import Any

from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DummyLayer, DynamicLayer

from kvcache.caches.contract import KVCache, Unsupported
from kvcache.caches.states import State, bring_back, referenced, row_bytes


class DynamicKV(KVCache):
    """Grows by making new tensors, so that keys and values of a mark are never written again, and are not copied.

    States that are written in place (convolutions, recurrent states) are.
    """

    def _empty(self) -> Cache:
        self._marked: list[State] = []
        return DynamicCache(config=self.config)

    def mark(self) -> None:
        self._marked = [referenced(layer) for layer in self.layers]

    def restore(self) -> None:
        if not self._marked:
            self.cache = self._empty()
            return
        for layer, state in zip(self.layers, self._marked, strict=True):
            bring_back(layer, state)

    @property
    def used_bytes(self) -> int:
        return row_bytes(self.layers)


def refuse_other_layers(config: PreTrainedConfig, kind: str) -> None:
    """Refuse a model of which a layer keeps anything else than the keys and values of all tokens.

    Raises:
        Unsupported: a layer slides, or keeps other states.
    """
    _refuse(config, kind, {DynamicLayer})


def refuse_alibi_of_the_fed(config: PreTrainedConfig, kind: str) -> None:
    """Refuse Falcon with ALiBi, whose bias is as long as the tokens fed: attention must see as many keys.

    Raises:
        Unsupported: it is one.
    """
    if getattr(config, "alibi", False):
        raise Unsupported(
            f"{config.model_type} makes its ALiBi bias as long as the tokens so far; {kind} shows it another number of "
            "keys"
        )


def replaced_layers(config: PreTrainedConfig, layer: Callable[[], DynamicLayer], kind: str) -> list[Any]:
    """Make a `layer` for each of the model's with full attention; those that store nothing stay as they are.

    Raises:
        Unsupported: a layer slides, or keeps other states.
    """
    _refuse(config, kind, {DynamicLayer, DummyLayer})
    return [layer() if type(own) is DynamicLayer else own for own in DynamicCache(config=config).layers]


def _refuse(config: PreTrainedConfig, kind: str, allowed: set[type]) -> None:
    others = {type(layer).__name__ for layer in DynamicCache(config=config).layers if type(layer) not in allowed}
    if others:
        raise Unsupported(f"{kind} holds layers with full attention only; this model has {', '.join(sorted(others))}")
