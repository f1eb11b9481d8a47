"""The contract of a kind of cache: make an empty one, mark a state, come back to it, say what its tokens take.

Marking happens once, untimed, after the context has been fed; `restore` comes before each repetition. Without a mark
it comes back to an empty cache.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol

from transformers import Cache, PreTrainedModel

Promise = Literal["exact", "lossy"]
"""`exact`: logits equal those without a cache, within the tolerance of the dtype; `lossy`: tokens may change."""


class Unsupported(Exception):
    """This model cannot be run in this way on this machine; the message is the reason, in one line."""


class CacheNotRead(Unsupported):
    """The model answers without the cache that it is given, so that a step would see its own token alone."""


class UnfitCache(Exception):
    """A cache that others wrote does not do what a cache must; the message is the reason, in one line."""


def layers_of(cache: Cache) -> list[Any]:
    """Return a cache's layers; a user's may hold them by name, or have none and override whatever a model calls."""
    layers = getattr(cache, "layers", ())
    return list(layers.values() if isinstance(layers, Mapping) else layers)


def counts_tokens(cache: Cache) -> bool:
    """Return whether `get_seq_length` has an answer: transformers' raises where all layers are recurrent states."""
    layers = layers_of(cache)
    return not layers or any(hasattr(layer, "get_seq_length") for layer in layers)


class KVCache(ABC):
    """What every layer keeps of up to `capacity` tokens.

    Keys and values are `[batch, kv_heads, tokens, head_dim]` each; transformers' layers may have other states, too
    (convolutions, recurrent states, keys of an indexer).
    """

    cache: Cache
    promise: ClassVar[Promise] = "exact"
    of_user: ClassVar[bool] = False
    """Whether others wrote it, so that a forward with it may fail by its fault."""
    takes_padding: ClassVar[bool] = True
    """False for a kind that would hold padding in place of tokens."""
    padded_length = 0
    """Tokens that attention sees whatever is filled; 0 where it sees the filled ones alone."""
    fed = 1, 0
    """How many sequences it is fed, and how many tokens of a context come before the prompt."""

    def __init__(self, model: PreTrainedModel, capacity: int, prompt_length: int | None = None) -> None:
        """Make an empty cache for `model`; `prompt_length` tokens come before the first generated one.

        Raises:
            CacheNotRead: the model's class takes no cache of transformers.
            Unsupported: this kind cannot hold what the model's layers keep.
        """
        self.config, self.device, self.capacity = model.config, model.device, capacity
        self.model_type: str = model.config.model_type
        self.prompt_length = prompt_length
        if not getattr(model, "_supports_default_dynamic_cache", lambda: True)():  # rwkv, xlnet, reformer, minimax ...
            raise CacheNotRead(f"{self.model_type} keeps its states in a form of its own, in no Cache of transformers")
        if not hasattr(self.config.get_text_config(decoder=True), "num_hidden_layers"):  # blt
            raise Unsupported(f"{self.model_type} has no num_hidden_layers, from which a cache knows its layers")
        self.cache = self._empty()

    @property
    def layers(self) -> list[Any]:
        """The cache's layers; their attributes differ by kind, and transformers gives them no common type."""
        return layers_of(self.cache)

    @property
    def restores(self) -> bool:
        """Return whether `restore` comes back to the mark; if not, it comes back to empty: the context is fed again.

        It does for layers of transformers and of this package. Of any other, which a user's model may bring along,
        nothing is assumed about how to copy it.
        """
        packages = {type(layer).__module__.partition(".")[0] for layer in self.layers}
        return packages <= {"transformers", "kvcache"}

    @abstractmethod
    def _empty(self) -> Cache:
        """Make a new cache without tokens."""

    @abstractmethod
    def mark(self) -> None:
        """Remember the present state as the one that `restore` comes back to."""

    @abstractmethod
    def restore(self) -> None:
        """Come back to the mark, or to empty where nothing was marked."""

    def check_length(self, n_tokens: int) -> None:
        """Compare what the cache says that it has seen with the `n_tokens` that it was fed.

        Raises:
            UnfitCache: they differ, so that positions are wrong from here on.
        """
        if not counts_tokens(self.cache):
            return
        found = int(self.cache.get_seq_length())
        if found != n_tokens:
            raise UnfitCache(f"get_seq_length() is {found} after {n_tokens} tokens; positions are counted from it")

    @property
    def stored(self) -> object:
        """Return what every stored key and value can be reached from."""
        return self.cache

    @property
    def is_empty(self) -> bool:
        """Return whether it neither holds bytes nor says that it has seen tokens."""
        return not self.used_bytes and not self._counted

    @property
    def _counted(self) -> bool:
        return counts_tokens(self.cache) and bool(self.cache.get_seq_length())

    @property
    @abstractmethod
    def used_bytes(self) -> int:
        """Bytes of keys, values and other states that belong to tokens, padding left out."""


class Kind(Protocol):
    """Makes an empty cache of one kind; a subclass of `KVCache` is one."""

    promise: Promise
    takes_padding: bool

    def __call__(self, model: PreTrainedModel, capacity: int, prompt_length: int | None, /) -> KVCache:
        """Make one for up to `capacity` tokens, of which `prompt_length` come before the first generated one."""
