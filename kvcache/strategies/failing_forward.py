"""A forward that fails in transformers' own code: refused with the reason, and with what may help.

An error raised there may still be the fault of whoever called: a cache that returns a wrong shape, a module of the user
that hands on something else. So it counts as transformers' only where all that took part is theirs.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from transformers import Cache, PreTrainedModel

from kvcache.caches.contract import Unsupported, layers_of
from kvcache.models.skeleton import is_out_of_memory, one_line


class ForwardFails(Unsupported):
    """The model's forward, as transformers writes it, fails in this way of calling it, whoever calls."""


OF_DEVICE = ("cuda error", "cublas", "cudnn", "could not create")
"""What libraries of a device say when they fail, for want of memory as a rule (the last is oneDNN's): RuntimeErrors."""


@contextmanager
def naming_transformers(model: PreTrainedModel, doing: str = "a forward", cache: Cache | None = None) -> Iterator[None]:
    """Raise ForwardFails as `refuse_transformers_error` does; any other error stays as it is.

    Nothing may be passed to the model inside but ids, positions, a mask that was checked, and `cache`.
    """
    try:
        yield
    except Exception as error:
        refuse_transformers_error(error, model, doing, cache)
        raise


def refuse_transformers_error(error: Exception, model: PreTrainedModel, doing: str, cache: Cache | None = None) -> None:
    """Do nothing about an error that others may have caused, or about a device or memory that failed.

    Raises:
        ForwardFails: the error is of transformers' own code, as are all modules of the model and the `cache`.
    """
    place = _place(error)
    if place is not None and _is_transformers(model, cache) and not _is_of_device(error):
        raise ForwardFails(
            f"{doing} of {model.config.model_type} fails in transformers ({place}): {one_line(error)}"
            f"{_advice(model, error)}"
        ) from error


def _is_transformers(model: PreTrainedModel, cache: Cache | None) -> bool:
    """Return whether the classes and forwards of all modules, of the cache and its layers are transformers' or torch's.

    A forward may have been replaced on a class or an object.
    """
    modules = list(model.modules())
    parts = [*modules, *([] if cache is None else [cache, *layers_of(cache)])]
    origins = [type(part).__module__ for part in parts]
    origins += [str(getattr(module.forward, "__module__", None)) for module in modules]
    return {origin.partition(".")[0] for origin in origins} <= {"transformers", "torch"}


def _is_of_device(error: Exception) -> bool:
    message = str(error).lower()
    failed = isinstance(error, torch.AcceleratorError) or any(words in message for words in OF_DEVICE)
    return failed or is_out_of_memory(error)


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
