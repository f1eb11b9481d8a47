"""A spec -> a model: described from its configuration, loaded, its weights named."""

from kvcache.models.spec import (
    ATTN_IMPLEMENTATIONS,
    BUNDLED,
    DEVICES,
    DTYPES,
    GEOMETRIES,
    ModelDescription,
    ModelError,
    describe,
    load,
    load_tokenizer,
    weights_digest,
)

__all__ = [
    "ATTN_IMPLEMENTATIONS",
    "BUNDLED",
    "DEVICES",
    "DTYPES",
    "GEOMETRIES",
    "ModelDescription",
    "ModelError",
    "describe",
    "load",
    "load_tokenizer",
    "weights_digest",
]
