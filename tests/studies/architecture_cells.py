"""One type of the matrix of architectures: every strategy by every way of feeding, each a cell with its outcome."""

import itertools
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcache.caches.contract import CacheNotRead, Unsupported
from kvcache.proof.tokens import NotRepeatable, Reference, agreement, reference
from kvcache.strategies.strategy import Strategy
from kvcache.strategies.tolerance import difference, largest, tolerance
from tests.studies.architecture_bytes import Prediction, Predictions, predictions
from tests.studies.architecture_cell import (
    BATCH_PADDED,
    BATCH_SIZES,
    CHUNKED,
    GENERATED,
    Cell,
    Outcome,
    Scenario,
)
from tests.studies.architecture_configs import shrunken
from tests.studies.architecture_errors import Slow, is_own, limited, line
from tests.studies.architecture_rounding import logits_of, rounding
from tests.tiny import EVERYWHERE, build_eagerly, token_ids

N_PROMPT, N_GEN, N_DEPTH = 12, 5, 8
"""They cross the windows, chunks and top-k of 8, the convolutions of 4 and the longrope switch at 14."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
REFUSALS = (Unsupported, NotRepeatable)
"""How a strategy says that it does not take a model; a padded prompt is refused by a ValueError of kvcache's own."""


def cells(model_type: str, dtypes: Sequence[str]) -> Iterator[Cell]:
    """Try everything with one type."""
    for dtype in dtypes:
        try:
            with limited():
                model = shrunken(model_type, DTYPES[dtype])
        except Exception as error:  # noqa: BLE001  # whatever transformers raises where it cannot make one
            yield Cell(model_type, dtype, 0, "", "", "refused", reason=line(error))
            return
        for cell in _of(model, model_type, dtype):
            narrow = cell.outcome == "false" and cell.logits_error is not None and dtype != "float32"
            yield replace(cell, rounding_error=_rounding(model, cell)) if narrow else cell


def cells_of_bytes(model_type: str) -> Iterator[Cell]:
    """Only count what the cached strategies hold, in float32 with the larger batch; no outcome is judged."""
    model, batch_size = shrunken(model_type), max(BATCH_SIZES)
    with predictions(model) as bytes_of:
        for scenario, name in itertools.product(GENERATED, CHUNKED):
            cell = Cell(model_type, "float32", batch_size, name, scenario, "right")
            counted = None
            with suppress(Exception), limited():  # the cell of the whole study has the reason
                counted = _counted(cell, model, bytes_of)
            if counted is not None:
                yield counted


def _counted(cell: Cell, model: PreTrainedModel, bytes_of: Predictions) -> Cell:
    n_depth, batch_size = N_DEPTH if cell.scenario == "context" else 0, cell.batch_size
    context = token_ids(1, batch_size, n_depth) if n_depth else None
    strategy = build_eagerly(cell.strategy, model)
    strategy.prepare(batch_size, n_depth + N_PROMPT + N_GEN, context, prompt_length=n_depth + N_PROMPT)
    held: list[tuple[int, int]] = []
    strategy.generate(
        token_ids(2, batch_size, N_PROMPT),
        N_GEN,
        lambda _token, _logits: held.append((strategy.kv_bytes, strategy.kv_bytes_allocated)),
        forced=token_ids(5, batch_size, N_GEN),
    )
    return _with_bytes(cell, held[-1], bytes_of.of(cell.strategy, batch_size, n_depth, N_PROMPT, N_GEN))


def _with_bytes(cell: Cell, held: tuple[int, int], predicted: Prediction) -> Cell:
    """Add what was held, used and allocated, and what was predicted."""
    return replace(
        cell,
        kv_bytes_measured=held[0],
        kv_bytes_predicted=predicted.used,
        kv_bytes_allocated=held[1],
        kv_bytes_allocated_predicted=predicted.allocated,
        unpredicted=predicted.reason,
    )


def _of(model: PreTrainedModel, model_type: str, dtype: str) -> Iterator[Cell]:
    wrong: set[str] = set()  # and said to be so
    with predictions(model) as predicted:
        for batch_size in BATCH_SIZES:
            for scenario in GENERATED:
                for cell in _generated(model, predicted, model_type, dtype, batch_size, scenario):
                    if cell.outcome == "false" or cell.prefix_stable is False:
                        wrong.add(cell.strategy)
                    yield cell
    yield from _padded(model, model_type, dtype, wrong)


def _generated(
    model: PreTrainedModel, bytes_of: Predictions, model_type: str, dtype: str, batch_size: int, scenario: Scenario
) -> Iterator[Cell]:
    n_depth = N_DEPTH if scenario == "context" else 0
    context = token_ids(1, batch_size, n_depth) if n_depth else None
    prompt = token_ids(2, batch_size, N_PROMPT)
    try:
        with limited():
            expected = reference(model, prompt, N_GEN, context)
    except Exception as error:  # noqa: BLE001  # it becomes the cell
        yield Cell(model_type, dtype, batch_size, "", scenario, _kind(error), reason=line(error))
        return
    for name in EVERYWHERE:
        where = (model_type, dtype, batch_size, name)
        try:
            with limited():
                strategy = build_eagerly(name, model)
                strategy.prepare(batch_size, n_depth + N_PROMPT + N_GEN, context, prompt_length=n_depth + N_PROMPT)
                found = agreement(strategy, prompt, expected)
                strategy.check_length(n_depth + N_PROMPT + N_GEN - 1)
                outcome = _again(strategy, prompt, expected, found.tokens_match)
                predicted = bytes_of.of(name, batch_size, n_depth, N_PROMPT, N_GEN)
            cell = Cell(*where, scenario, outcome, found.logits_error, expected.prefix_stable)
            held = (found.kv_bytes_after_decode, found.kv_bytes_allocated_after_decode)
            yield _with_bytes(cell, held, predicted)
        except Exception as error:  # noqa: BLE001  # it becomes the cell
            # As `run` says it: other tokens would come in any case, where earlier positions depend on later ones.
            unread = isinstance(error, CacheNotRead) and not expected.prefix_stable
            outcome = "false" if unread else _kind(error)
            yield Cell(*where, scenario, outcome, None, expected.prefix_stable, line(error))
            continue
        if not n_depth and name in CHUNKED:
            yield _in_chunks(strategy, where, prompt, expected)


def _again(strategy: Strategy, prompt: Tensor, expected: Reference, match: str) -> Outcome:
    """A whole round more, from `reset`: what is `true` must be so in each."""
    if match != "true":
        return "tie" if match == "tie" else "false"
    strategy.reset()
    return "right" if torch.equal(strategy.generate(prompt, N_GEN), expected.tokens) else "silent"


@torch.inference_mode()
def _in_chunks(strategy: Strategy, where: tuple[str, str, int, str], prompt: Tensor, expected: Reference) -> Cell:
    """Feed the prompt in three pieces, then the expected tokens."""
    try:
        with limited():
            strategy.reset()
            first = [strategy.prefill(chunk) for chunk in prompt.chunk(3, dim=1)]
            steps = [first[-1], *(strategy.decode(expected.tokens[:, at : at + 1]) for at in range(N_GEN - 1))]
    except Exception as error:  # noqa: BLE001  # it becomes the cell
        return Cell(*where, "chunks", _kind(error), None, expected.prefix_stable, line(error))
    apart = difference(expected.logits, torch.stack(steps, dim=1), largest(expected.logits))
    outcome: Outcome = "right" if apart <= tolerance(strategy.model) else "false"
    return Cell(*where, "chunks", outcome, apart, expected.prefix_stable)


def _padded(model: PreTrainedModel, model_type: str, dtype: str, wrong: Collection[str]) -> Iterator[Cell]:
    """Rows of 5 and 9 tokens, padded on the left: each as alone, or refused; what else is `wrong` is known."""
    short, long = _rows()
    ids = torch.cat([torch.nn.functional.pad(short, (4, 0)), long])
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    fed = token_ids(5, 1, N_GEN)
    for name in EVERYWHERE:
        where = (model_type, dtype, BATCH_PADDED, name)
        try:
            with limited():
                together = build_eagerly(name, model)
                together.prepare(BATCH_PADDED, 9 + N_GEN, prompt_length=9)
                found = logits_of(together, ids, fed.expand(BATCH_PADDED, -1), mask)
                worst = 0.0
                for row, alone in enumerate((short, long)):
                    single = build_eagerly(name, model)
                    single.prepare(1, 9 + N_GEN, prompt_length=alone.shape[1])
                    expected = logits_of(single, alone, fed)
                    worst = max(worst, difference(expected[0], found[row], largest(expected)))
        except Exception as error:  # noqa: BLE001  # it becomes the cell
            outcome: Outcome = "refused" if isinstance(error, ValueError) and is_own(error) else _kind(error)
            yield Cell(*where, "padding", outcome, reason=line(error))
            continue
        yield Cell(*where, "padding", _padding_outcome(worst, model, known=name in wrong), worst)


def _rows() -> tuple[Tensor, Tensor]:
    return token_ids(3, 1, 5), token_ids(4, 1, 9)


def _padding_outcome(worst: float, model: PreTrainedModel, *, known: bool) -> Outcome:
    """Judge a padded row; twice the tolerance is still rounding: both rows have it, and add in another order."""
    if worst <= tolerance(model):
        return "right"
    if worst <= 2 * tolerance(model):
        return "tie"
    return "false" if known else "silent"


def _rounding(model: PreTrainedModel, cell: Cell) -> float | None:
    """Return how far rounding alone moves naive re-feed, fed what the cell was; None if that takes too long."""
    prompt = token_ids(2, cell.batch_size, N_PROMPT)
    if cell.scenario == "context":
        prompt = torch.cat([token_ids(1, cell.batch_size, N_DEPTH), prompt], dim=1)
    padded = cell.scenario == "padding"
    try:
        with limited():
            return max(rounding(model, fed, N_GEN, free=not padded) for fed in (_rows() if padded else [prompt]))
    except Slow:
        return None


def _kind(error: Exception) -> Outcome:
    return "refused" if isinstance(error, REFUSALS) else "failed"
