"""Slow-downs planted into a model for `nox -s study -- gate_power`: model factories that read KVBENCH_PLANTED.

`busy:0.05` is busy work, not sleep, after every decode step: 5 % of that step's own time. The real ones are what people
do to a decode step by mistake. The tokens stay the same, the weights too, and `busy:0` is what they are compared with.
"""

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

import kvcache

VARIABLE = "KVBENCH_PLANTED"
BASE = "busy:0"

Forward = Callable[..., Any]


def factory() -> PreTrainedModel:
    """`random:tiny` with the slow-down that the environment asks for."""
    return planted("random:tiny")


def smollm2() -> PreTrainedModel:
    """The same of `smollm2-135m`, whose steps are long."""
    return planted("smollm2-135m")


def planted(name: str) -> PreTrainedModel:
    """A model with the slow-down that the environment asks for."""
    kind, _, share = os.environ.get(VARIABLE, BASE).partition(":")
    if kind not in PLANTS:
        raise ValueError(f"{VARIABLE}={kind}: unknown; valid: {', '.join(PLANTS)}")
    plant = PLANTS[kind](float(share or 0))
    model = kvcache.load(name)
    plain = type(model)

    class Planted(plain):  # type: ignore[misc, valid-type]
        """The same model; its forward goes through `plant`."""

        def forward(self, input_ids: Any = None, logits_to_keep: Any = 0, **rest: Any) -> Any:
            def forward(**changed: Any) -> Any:
                own = {"input_ids": input_ids, "logits_to_keep": logits_to_keep}
                return plain.forward(self, **(own | rest | changed))

            return plant(forward, input_ids, rest.get("past_key_values"))

    Planted.__name__ = plain.__name__
    model.__class__ = Planted
    return model


def busy(share: float) -> Forward:
    """Compute for `share` of a decode step's time, after it."""

    def plant(forward: Forward, ids: torch.Tensor, cache: Any) -> Any:
        began = time.perf_counter_ns()
        found = forward()
        if ids.shape[1] == 1:
            ended = time.perf_counter_ns()
            while time.perf_counter_ns() - ended < share * (ended - began):
                pass
        return found

    return plant


def cache_dropped(_: float) -> Forward:
    """Feed the whole sequence again at every step, beside a cache that nobody reads."""
    fed: list[torch.Tensor] = []

    def plant(forward: Forward, ids: torch.Tensor, cache: Any) -> Any:
        if cache is None:
            return forward()
        fed[:] = [torch.cat([*fed, ids], dim=1)] if ids.shape[1] == 1 else [ids]
        return forward() if ids.shape[1] > 1 else forward(input_ids=fed[0], past_key_values=None, use_cache=False)

    return plant


def kv_clone(_: float) -> Forward:
    """Copy every key and value at every step."""

    def plant(forward: Forward, ids: torch.Tensor, cache: Any) -> Any:
        found = forward()
        for layer in cache.layers if cache is not None else ():
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
        return found

    return plant


def all_logits(_: float) -> Forward:
    """The LM head on all positions: costs where there are many, in prefill."""
    return lambda forward, ids, cache: forward(logits_to_keep=0)


def item(_: float) -> Forward:
    """Fetch the token as a Python number at every step."""

    def plant(forward: Forward, ids: torch.Tensor, cache: Any) -> Any:
        found = forward()
        found.logits[:, -1].argmax(dim=-1).max().item()
        return found

    return plant


PLANTS: dict[str, Callable[[float], Forward]] = {
    "busy": busy,
    "cache-dropped": cache_dropped,
    "kv-clone": kv_clone,
    "all-logits": all_logits,
    "item": item,
}
