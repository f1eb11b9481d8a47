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


def _head_dim(model: PreTrainedModel) -> int:
    config = model.config
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


@package("turboquant==0.2.0", settings="3 bits, 128 tokens exact (defaults)")
def turboquant(model: PreTrainedModel) -> object:
    """Rotate and quantise all but the recent tokens."""
    from turboquant.cache import TurboQuantCache

    return TurboQuantCache(bits=3)


@package("kakeyalattice==1.5.0", settings="e8, q_range 38 (recommended)")
def kakeyalattice(model: PreTrainedModel) -> object:
    """Round to a lattice what a DynamicCache then keeps."""
    from kakeyalattice.hf import KakeyaLatticeCache

    return KakeyaLatticeCache(
        variant="e8",
        q_range=38,
        num_hidden_layers=model.config.num_hidden_layers,
        head_dim=_head_dim(model),
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


@package("fade-kv==1.1.0", settings="defaults; nothing assigns tiers; asks for transformers < 5.4")
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

    return turboquant_dynamic_cache(model.config, TurboQuantProd(bits=3, head_dim=_head_dim(model), device="cpu"))


@package("turboquant-explained==0.1.1", settings="2 bits, 128 tokens exact (defaults)")
def turboquant_explained(model: PreTrainedModel) -> object:
    """Quantise all but the recent tokens."""
    from turboquant.kv_cache.hooks import TurboQuantCache

    return TurboQuantCache(head_dim=_head_dim(model), device="cpu")


@package("turboquantdc==0.2.0", settings="3 bits keys, 2 bits values, 128 tokens exact (defaults)")
def turboquantdc(model: PreTrainedModel) -> object:
    """Quantise all but the recent tokens and every sixth layer."""
    from turboquantdc import GenerationCache

    return GenerationCache()


@package("turboquant-serve==0.1.2", settings="4 bits (defaults), dtype=model.dtype")
def turboquant_serve(model: PreTrainedModel) -> object:
    """Store all tokens as rotated codes, unpacked at every step."""
    from turboquant import TurboQuantCache

    return TurboQuantCache(key_bits=4, value_bits=4, dtype=model.dtype)


@package("turboquant-serve==0.1.2", settings="4 bits (defaults)")
def turboquant_serve_defaults(model: PreTrainedModel) -> object:
    """Do the same and return bfloat16, whatever the model's dtype is."""
    from turboquant import TurboQuantCache

    return TurboQuantCache(key_bits=4, value_bits=4)


@package("tqai==0.6.1", settings="4 bits keys, 2 bits values (defaults)")
def tqai(model: PreTrainedModel) -> object:
    """Quantise each token once and keep what it is read back as."""
    from tqai import patch

    return patch(model)


@package("zerokv-neo==4.0.0", settings="defaults")
def zerokv(model: PreTrainedModel) -> object:
    """Keep a window exact, the rest in polar codes."""
    from zerokv.cache import build_zerokv_cache

    return build_zerokv_cache(model.config)


@package("akv-cache==1.4.0", settings="defaults")
def akv(model: PreTrainedModel) -> object:
    """Keep tiers of precision, evicting by importance."""
    from akv.integration import HFAdaptiveCache

    return HFAdaptiveCache()


@package("argus-cache==0.2.0", settings="defaults")
def argus(model: PreTrainedModel) -> object:
    """Compress pages of 4,096 tokens in seven tiers."""
    from argus_cache.models.attention_wrapper import PagedDynamicQuantizedCache

    return PagedDynamicQuantizedCache()


@package("kvq==0.1.0", settings="4 bits, compute_dtype=model.dtype")
def kvq(model: PreTrainedModel) -> object:
    """Quantise with HQQ, in the lists of transformers 4."""
    from kvq import KVQ, KVQConfig

    return KVQ(KVQConfig(nbits=4, compute_dtype=model.dtype))


@package("fused-turboquant==0.1.0", settings="4 bits")
def fused_turboquant(model: PreTrainedModel) -> object:
    """Replace the model's attention by one that reads codes (Triton)."""
    from fused_turboquant.hf import patch_model

    return patch_model(model, bits=4)


@package("spectral-kv==1.0.0", settings="4 bits, no profile")
def spectral_kv(model: PreTrainedModel) -> object:
    """Project keys to few dimensions; a class of its own, no subclass of Cache."""
    from spectral_kv.spectral import SpectralCache, SpectralProfile

    return SpectralCache(SpectralProfile("", head_dim=_head_dim(model), n_layers=0, n_heads=0, target_energy=0.95))


@package("turboquant-pro==1.9.1", settings="512 tokens exact (defaults)")
def turboquant_pro(model: PreTrainedModel) -> object:
    """Keep a window exact; keys before it in NF4 by channel, values rotated and quantised."""
    from turboquant_pro.hf_cache import TurboQuantCache

    return TurboQuantCache()


@package("turbokv==0.1.0", settings="4 bits, 128 tokens and layer 0 exact (defaults)")
def turbokv(model: PreTrainedModel) -> object:
    """Rotate and quantise in the layers of transformers' QuantizedCache."""
    from turboquant.cache import TurboQuantCache

    return TurboQuantCache(model.config, device=str(model.device))


@package("ginkgoq-turboquant==0.1.0.post1", settings="4 bits (defaults)")
def ginkgoq(model: PreTrainedModel) -> object:
    """Replace `update` of a DynamicCache by one that keeps codes and what they are read back as."""
    from transformers import DynamicCache
    from turboquant.integration.hf.dynamic_cache import CompressedDynamicCache

    cache = DynamicCache(config=model.config)
    CompressedDynamicCache(cache, head_dim=_head_dim(model), model_config=model.config)
    return cache
