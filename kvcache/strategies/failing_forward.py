"""A forward that fails in transformers' own code: refused with the reason, and with what may help."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from kvcache.caches.contract import Unsupported
from kvcache.models.skeleton import is_out_of_memory, one_line


class ForwardFails(Unsupported):
    """The model's forward, as transformers writes it, fails in this way of calling it, whoever calls."""


@contextmanager
def naming_transformers(model: PreTrainedModel, doing: str = "a forward") -> Iterator[None]:
    """Raise ForwardFails for an error of transformers' own code; any other error, and out of memory, stays as it is."""
    try:
        yield
    except Exception as error:
        refuse_transformers_error(error, model, doing)
        raise


def refuse_transformers_error(error: Exception, model: PreTrainedModel, doing: str) -> None:
    """Do nothing about an error of anything but transformers' own code, or about memory that ran out.

    Raises:
        ForwardFails: the error is of transformers' own code.
    """
    place = _place(error)
    if place is not None and not isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error):
        raise ForwardFails(
            f"{doing} of {model.config.model_type} fails in transformers ({place}): {one_line(error)}"
            f"{_advice(model, error)}"
        ) from error


def _place(error: Exception) -> str | None:
    """Return file and line where transformers' code failed, by itself or in torch; None where others' code did."""
    folders = [Path(str(package.__file__)).parent for package in (torch, transformers)]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_relative_to(folders[1]):
            return f"{path.name}, line {frame.lineno}"
        if path.is_absolute() and not path.is_relative_to(folders[0]):
            return None
    return None


def _advice(model: PreTrainedModel, error: Exception) -> str:
    """Say what may help where types of numbers do not fit together."""
    kinds = sorted({str(weight.dtype).removeprefix("torch.") for weight in model.parameters()})
    about_types = any(word in str(error) for word in ("dtype", "scalar type", "BFloat16", "Half"))
    return f"; its weights are {' and '.join(kinds)}: take float32" if about_types and kinds != ["float32"] else ""
