"""What a user should know of a checkpoint that is read without an error: it may not compute what its author meant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcache.models.gguf_header import rotary_scaling
from kvcache.models.skeleton import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NARROW_FLOATS, _NARROW_INTEGERS = ("F8", "F6", "F4"), ("I8", "U8")
"""How safetensors' names of types begin whose numbers need a scale."""


def of_gguf(path: Path) -> Iterator[str]:
    """Yield what transformers leaves out when it reads the GGUF file at `path`: any scaling of the rotary positions."""
    scaling = rotary_scaling(path)
    if scaling is not None:
        yield (
            f"{path.name} scales its rotary positions ({scaling}), which transformers ignores in a GGUF file: its "
            "times are right, and its text is not the model's"
        )


def of_safetensors(weights: tuple[Path, ...], bare: PreTrainedModel) -> Iterator[str]:
    """Yield what differs between safetensors files and the model without weights that their config.json describes."""
    from safetensors import safe_open

    with ExitStack() as stack:
        holders: dict[str, Any] = {}
        for path in weights:
            file = stack.enter_context(safe_open(path, framework="pt"))
            holders |= dict.fromkeys(file.keys(), file)
        yield from _of_narrow_types(holders, getattr(bare.config, "quantization_config", None))
        yield from _of_ties(holders, getattr(bare, "all_tied_weights_keys", {}), f"{bare.base_model_prefix}.")


def _of_narrow_types(holders: Mapping[str, Any], quantization: Any) -> Iterator[str]:
    from transformers.quantizers.auto import AutoHfQuantizer

    why = "config.json has no quantization_config"
    if quantization is not None:
        with quiet():
            if AutoHfQuantizer.supports_quant_method(quantization):
                return
        why = f"transformers knows no quantization method {quantization.get('quant_method')!r}"
    types = {name: file.get_slice(name).get_dtype() for name, file in holders.items()}
    floats = [name for name, kind in types.items() if kind.startswith(_NARROW_FLOATS)]
    # Old files of GPT-2 hold masks of 8 bits, too.
    integers = [name for name, kind in types.items() if kind.startswith(_NARROW_INTEGERS) and name.endswith("weight")]
    for names, kind in ((floats, "8-bit floating point"), (integers, "8-bit integers")):
        if names:
            yield (
                f"{len(names)} tensors are stored in {kind} without scales that transformers would apply ({why}), "
                f"{names[0]} among them: their numbers are converted as they are"
            )


def _of_ties(holders: Mapping[str, Any], tied: Mapping[str, str], prefix: str) -> Iterator[str]:
    """Compare tied matrices; files of GPT-2 and its kin on the hub lack the `prefix` of the inner model in names."""
    for target, source in tied.items():
        spellings = [(name, name.removeprefix(prefix)) for name in (target, source)]
        stored = [next((name for name in names if name in holders), "") for names in spellings]
        if "" in stored:
            continue
        one, other = (holders[name].get_tensor(name) for name in stored)
        if one.shape != other.shape or not bool((one == other).all()):
            yield (
                f"config.json ties {target} to {source}, and the file holds two different matrices: transformers uses "
                "both, so the weights are larger than the configuration says"
            )
