"""Granite: Llama with multipliers of the embeddings, of both blocks' outputs, of the scores and of the logits."""

from __future__ import annotations

import dataclasses
from typing import Any

from kvcache.compiled.architectures import llama
from kvcache.compiled.decoder import Decoder


def describe(model: Any) -> Decoder:
    """Describe Granite; the multiplier of its scores is the `scaling` of its attention."""
    plain = llama.llama(model)
    return dataclasses.replace(
        plain,
        layers=tuple(
            layer._replace(residual=block.residual_multiplier)
            for layer, block in zip(plain.layers, model.model.layers, strict=True)
        ),
        head=plain.head._replace(divisor=model.config.logits_scaling),
        embedding=model.model.embedding_multiplier,
    )
