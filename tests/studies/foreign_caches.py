"""Caches that others publish, each as a factory for `cache:foreign_caches:NAME`; the study `foreign` measures them.

Settings are those that a package's own documentation recommends, nothing tuned. Each package lies in a folder of its
own (five of them call their module `turboquant`), which its factory puts on the path of the worker that runs it.
"""

import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

FOLDERS = "KVBENCH_FOREIGN"
"""The environment variable that names the folder with a folder for each package."""

Factory = Callable[..., object]


@dataclass(frozen=True, kw_only=True)
class Package:
    """One cache of a package: the pins that pip installs (no dependencies besides), and what the factory makes."""

    pins: tuple[str, ...]
    settings: str

    @property
    def title(self) -> str:
        """The package and its version."""
        return self.pins[0].replace("==", " ")


PACKAGES: dict[str, Package] = {}
"""What is measured, by the name of its factory."""


def package(*pins: str, settings: str) -> Callable[[Factory], Factory]:
    """Register a factory; called, it finds its package's folder first on the path, since a name may be anybody's."""

    def register(factory: Factory) -> Factory:
        PACKAGES[factory.__name__] = Package(pins=pins, settings=settings)

        @functools.wraps(factory)  # kvbench reads from its signature what it wants
        def find_and_make(*arguments: object, **named: object) -> object:
            folder = str(Path(os.environ[FOLDERS], factory.__name__))
            if folder not in sys.path:
                sys.path.insert(0, folder)
            return factory(*arguments, **named)

        return find_and_make

    return register


@package("turboquant==0.2.0", settings="3 bits, 128 tokens exact (defaults)")
def turboquant(model: PreTrainedModel) -> object:
    """Rotate and quantise all but the recent tokens."""
    from turboquant.cache import TurboQuantCache

    return TurboQuantCache(bits=3)


@package("kakeyalattice==1.5.0", settings="e8, q_range 38 (recommended)")
def kakeyalattice(model: PreTrainedModel) -> object:
    """Round to a lattice what a DynamicCache then keeps."""
    from kakeyalattice.hf import KakeyaLatticeCache

    config = model.config.get_text_config(decoder=True)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return KakeyaLatticeCache(
        variant="e8",
        q_range=38,
        num_hidden_layers=config.num_hidden_layers,
        head_dim=head_dim,
        device=model.device,
    )


@package("randkv==0.1.0", settings="the whole prompt and 8 more tokens")
def randkv(model: PreTrainedModel, prompt_length: int) -> object:
    """Evict generated tokens by chance; the prompt stays, so its length must be known."""
    from randkv.config import RandKVConfig
    from randkv.transformers import RandKVCache

    config = RandKVConfig(budget=prompt_length, buffer_size=8)
    return RandKVCache(model_config=model.config, prompt_length=prompt_length, randkv_config=config)


@package("tiny-turboquant==0.18.0", settings="compression=safe: 4 bits, 128 tokens exact")
def tiny_turboquant(model: PreTrainedModel) -> object:
    """KIVI's scheme in blocks of 128."""
    from tiny_turboquant import TinyKVCache

    return TinyKVCache.for_model(model, compression="safe")


@package("quantcore-ai==0.4.2", settings="4 bits, values exact (defaults)")
def quantcore(model: PreTrainedModel) -> object:
    """Rotate and quantise keys."""
    from turboquant.hf_integration import make_turboquant_cache

    return make_turboquant_cache(model.config, verbose=False)


@package("nexusquant-kv==0.6.3", "zstandard==0.25.0", settings="3 bits keys, 2 bits values (defaults)")
def nexusquant(model: PreTrainedModel) -> object:
    """Round a prompt to the E8 lattice; generated tokens stay exact."""
    from nexusquant.integrations.quantized_cache import E8QuantizedCache

    return E8QuantizedCache.from_model(model)


@package("fade-kv==1.1.0", settings="defaults; nothing assigns tiers")
def fade(model: PreTrainedModel) -> object:
    """Keep tiers of precision; who moves tokens between them is the caller."""
    from fade.cache import TieredKVCache

    return TieredKVCache(dtype=model.dtype)


@package("adaptivekv==0.1.0", settings="2 to 4 bits by layer (defaults)")
def adaptivekv(model: PreTrainedModel) -> object:
    """Give each layer its number of bits."""
    from adaptivekv import AdaptiveKVCache

    return AdaptiveKVCache()


@package("turboquant-torch==0.4.0", settings="3 bits (defaults); nothing calls compress_all")
def turboquant_torch(model: PreTrainedModel) -> object:
    """Compress when the caller says so."""
    from turboquant.hf_cache import TurboQuantDynamicCache

    return TurboQuantDynamicCache()


@package("turboquant-kv==1.0.0", settings="3 bits")
def turboquant_kv(model: PreTrainedModel) -> object:
    """Store rotated codes and a sketch of what they lose."""
    from turboquant import TurboQuantProd
    from turboquant.hf_cache import turboquant_dynamic_cache

    config = model.config.get_text_config(decoder=True)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return turboquant_dynamic_cache(model.config, TurboQuantProd(bits=3, head_dim=head_dim, device="cpu"))


@package("turboquant-explained==0.1.1", settings="2 bits, 128 tokens exact (defaults)")
def turboquant_explained(model: PreTrainedModel) -> object:
    """Quantise all but the recent tokens."""
    from turboquant.kv_cache.hooks import TurboQuantCache

    config = model.config.get_text_config(decoder=True)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return TurboQuantCache(head_dim=head_dim, device="cpu")


@package("turboquantdc==0.2.0", settings="3 bits keys, 2 bits values, 128 tokens exact (defaults)")
def turboquantdc(model: PreTrainedModel) -> object:
    """Quantise all but the recent tokens and every sixth layer."""
    from turboquantdc import GenerationCache

    return GenerationCache()
