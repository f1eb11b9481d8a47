"""What the matrix's caches hold, beside what `kvbench run` predicts of them before it reads any weights."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from bench.measure.case_costs import held
from kvcache import models
from kvcache.arithmetic.kv_bytes import Fed
from kvcache.proof.unknown_numbers import NotRehearsable


@dataclass(frozen=True)
class Prediction:
    """Bytes of a cache after its last step; None where `reason` says why there is no prediction."""

    used: int | None = None
    allocated: int | None = None
    reason: str = ""


class Predictions:
    """What is predicted of one model."""

    def __init__(self, model: models.ModelDescription | str, dtype: torch.dtype) -> None:
        """Take a described model, or the reason why `kvbench run` refuses it."""
        self._model, self._dtype = model, dtype

    def of(self, strategy: str, batch_size: int, n_depth: int, n_prompt: int, n_gen: int) -> Prediction:
        """Predict what `strategy` holds after the step that chose the last of n_gen tokens."""
        if isinstance(self._model, str):
            return Prediction(reason=self._model)
        fed = Fed(
            batch_size=batch_size,
            n_depth=n_depth,
            n_prompt=n_prompt,
            n_steps=n_gen - 1,
            capacity=n_depth + n_prompt + n_gen,
            dtype_bytes=self._dtype.itemsize,
        )
        try:
            found = held(self._model, strategy, str(self._dtype).removeprefix("torch."), fed)
        except NotRehearsable as reason:
            return Prediction(reason=str(reason)[:200])
        return Prediction(found.used, found.allocated) if found else Prediction(reason="no formula of its bytes")


@contextmanager
def predictions(model: PreTrainedModel) -> Iterator[Predictions]:
    """Store `model` as a checkpoint folder for as long as this lasts, and predict as `kvbench run -m FOLDER` does."""
    with tempfile.TemporaryDirectory(prefix="kvbench-architecture-") as folder:
        described: models.ModelDescription | str
        try:
            model.save_pretrained(folder)
            described = models.describe(folder)
        except Exception as error:  # noqa: BLE001  # whatever transformers or kvbench refuses is the reason
            described = f"{type(error).__name__}: {' '.join(str(error).replace(folder, '').split())[:200]}"
        yield Predictions(described, model.dtype)
