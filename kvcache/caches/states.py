"""What the layers of a cache keep, whatever their kind: counted, copied, and put back.

transformers' layers keep keys and values, and some of them convolution and recurrent states, keys of an indexer, or
compressed entries. Two habits of theirs are relied on: an attribute that holds a tensor is replaced in a growing cache
and written in place in a static one; containers (one state for each convolution, say) are always changed in place.
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor

from kvcache.caches.held_bytes import reachable_tensors

State = dict[str, Any]
"""The attributes of one layer, by name."""


def row_bytes(root: object) -> int:
    """Count the bytes of the rows and states that `root` keeps, each tensor once; a counter without axes is none.

    A view counts as what it shows: a sliding layer keeps a row more in its storage than it reads. Of an expanded one,
    which shows the same numbers several times, they count once.
    """
    return sum(_shown_bytes(tensor) for tensor in reachable_tensors(root) if tensor.dim())


def _shown_bytes(tensor: Tensor) -> int:
    if tensor.layout is not torch.strided or 0 not in tensor.stride() or not tensor.numel():
        return tensor.nbytes
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.itemsize * math.prod(size for size, stride in sizes if stride)


@torch.inference_mode()
def referenced(layer: object) -> State:
    """Take the state of a growing layer: its tensors are shared, since they are replaced; its containers are copied."""
    return {name: _unshared(value) for name, value in vars(layer).items()}


@torch.inference_mode()
def bring_back(layer: object, state: State) -> None:
    """Give a growing layer the `state` that `referenced` took; what was added to the layer since is dropped."""
    attributes = vars(layer)
    attributes.clear()
    attributes.update({name: _unshared(value) for name, value in state.items()})


@torch.inference_mode()
def cloned(layer: object) -> State:
    """Take the state of a layer that is written in place: everything is copied."""
    return {
        name: value.clone() if isinstance(value, Tensor) else _unshared(value) for name, value in vars(layer).items()
    }


@torch.inference_mode()
def write_back(layer: object, state: State) -> None:
    """Write the `state` that `cloned` took into the tensors of the layer, which stay where they are."""
    attributes = vars(layer)
    for name, value in state.items():
        present = attributes[name]
        if _takes(present, value):
            present.copy_(value)
        else:
            attributes[name] = value.clone() if isinstance(value, Tensor) else _unshared(value)


def _takes(present: Any, value: Any) -> bool:
    """Return whether `value` can be written into `present`: a tensor of its shape, no place of which is used twice.

    An expanded view (the positions of Qwen4's indexer) has places that stand for several elements.
    """
    if not isinstance(value, Tensor) or not isinstance(present, Tensor) or present.shape != value.shape:
        return False
    return not any(size > 1 and stride == 0 for size, stride in zip(present.shape, present.stride(), strict=True))


def _unshared(value: Any) -> Any:
    """Copy a container with all that is in it; anything else is returned as it is."""
    return copy.deepcopy(value) if isinstance(value, dict | list) else value
