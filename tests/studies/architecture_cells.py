"""One type of the matrix of architectures: every strategy by every way of feeding, each a cell with its outcome."""

import copy
import signal
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcache.caches.contract import Unsupported
from kvcache.proof.tokens import NonFiniteLogits, NotRepeatable, Reference, WrongShape, agreement, reference
from kvcache.strategies.strategy import Strategy
from kvcache.strategies.tolerance import difference, largest, tolerance
from tests.studies.architecture_configs import shrunken
from tests.tiny import EVERYWHERE, build_eagerly, token_ids

N_PROMPT, N_GEN, N_DEPTH = 12, 5, 8
"""Prompt and context cross the windows, chunks and top-k of 8, the convolutions of 4 and the longrope switch at 16."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BATCH_SIZES = (1, 3)
REFUSALS = (Unsupported, NotRepeatable)
"""How a strategy says that it does not take a model; a padded prompt is refused by a ValueError."""
ROUNDINGS = 12
CELL_S = 60
"""Processor time of one cell: a machine that is busy, or stops the study for a while, changes no outcome."""

Scenario = Literal["whole", "context", "chunks", "padding"]
Outcome = Literal["right", "tie", "false", "refused", "failed", "silent"]
"""`false`: other tokens or logits, and the proof says so. `silent`: other tokens without a word, which must not be."""


@dataclass(frozen=True)
class Cell:
    """What one strategy did with one model, fed in one way; `scenario` is empty where no model came about."""

    model_type: str
    dtype: str
    batch_size: int
    strategy: str
    scenario: Scenario | Literal[""]
    outcome: Outcome
    logits_error: float | None = None
    """Largest difference from the reference, as a share of its largest logit."""
    prefix_stable: bool | None = None
    reason: str = ""
    rounding_error: float | None = None
    """For a `false` in bfloat16: how far rounding alone moves naive re-feed, as such a share (`_rounding`)."""


class _Slow(Exception):
    """A cell took longer than `CELL_S`."""


def cells(model_type: str, dtypes: Sequence[str]) -> Iterator[Cell]:
    """Try everything with one type."""
    for dtype in dtypes:
        try:
            with _limit():
                model = shrunken(model_type, DTYPES[dtype])
            if model.config.is_encoder_decoder:
                raise Unsupported("an encoder and a decoder: kvbench takes decoders")  # noqa: TRY301  # becomes a cell
        except Exception as error:  # noqa: BLE001  # whatever transformers raises where it cannot make one
            yield Cell(model_type, dtype, 0, "", "", "refused", reason=_line(error))
            return
        for cell in _of(model, model_type, dtype):
            narrow = cell.outcome == "false" and dtype != "float32"
            yield replace(cell, rounding_error=_rounding(model, cell)) if narrow else cell


def _of(model: PreTrainedModel, model_type: str, dtype: str) -> Iterator[Cell]:
    wrong: set[str] = set()  # and said to be so
    for batch_size in BATCH_SIZES:
        for scenario in ("whole", "context"):
            for cell in _generated(model, model_type, dtype, batch_size, scenario):
                if cell.outcome == "false" or cell.prefix_stable is False:
                    wrong.add(cell.strategy)
                yield cell
    yield from _padded(model, model_type, dtype, wrong)


def _generated(
    model: PreTrainedModel, model_type: str, dtype: str, batch_size: int, scenario: Scenario
) -> Iterator[Cell]:
    n_depth = N_DEPTH if scenario == "context" else 0
    context = token_ids(1, batch_size, n_depth) if n_depth else None
    prompt = token_ids(2, batch_size, N_PROMPT)
    try:
        with _limit():
            expected = reference(model, prompt, N_GEN, context)
    except Exception as error:  # noqa: BLE001  # it becomes the cell
        yield Cell(model_type, dtype, batch_size, "", scenario, _kind(error), reason=_line(error))
        return
    for name in EVERYWHERE:
        where = (model_type, dtype, batch_size, name)
        try:
            with _limit():
                strategy = build_eagerly(name, model)
                strategy.prepare(batch_size, n_depth + N_PROMPT + N_GEN, context, prompt_length=n_depth + N_PROMPT)
                found = agreement(strategy, prompt, expected)
                strategy.check_length(n_depth + N_PROMPT + N_GEN - 1)
                outcome = _again(strategy, prompt, expected, found.tokens_match)
            yield Cell(*where, scenario, outcome, found.logits_error, expected.prefix_stable)
        except Exception as error:  # noqa: BLE001  # it becomes the cell
            yield Cell(*where, scenario, _kind(error), None, expected.prefix_stable, _line(error))
            continue
        if not n_depth and name in {"dynamic", "static"}:
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
        with _limit():
            strategy.reset()
            first = [strategy.prefill(chunk) for chunk in prompt.chunk(3, dim=1)]
            steps = [first[-1], *(strategy.decode(expected.tokens[:, at : at + 1]) for at in range(N_GEN - 1))]
    except Exception as error:  # noqa: BLE001  # it becomes the cell
        return Cell(*where, "chunks", _kind(error), None, expected.prefix_stable, _line(error))
    apart = difference(expected.logits, torch.stack(steps, dim=1), largest(expected.logits))
    outcome: Outcome = "right" if apart <= tolerance(strategy.model) else "false"
    return Cell(*where, "chunks", outcome, apart, expected.prefix_stable)


def _padded(model: PreTrainedModel, model_type: str, dtype: str, wrong: Collection[str]) -> Iterator[Cell]:
    """Rows of 5 and 9 tokens, padded on the left: each as alone, or refused; what else is `wrong` is known."""
    short, long = _rows()
    ids = torch.cat([torch.nn.functional.pad(short, (4, 0)), long])
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for name in EVERYWHERE:
        where = (model_type, dtype, 2, name)
        try:
            with _limit():
                together = build_eagerly(name, model)
                together.prepare(2, 9 + N_GEN, prompt_length=9)
                found = _logits(together, ids, mask)
                worst = 0.0
                for row, alone in enumerate((short, long)):
                    single = build_eagerly(name, model)
                    single.prepare(1, 9 + N_GEN, prompt_length=alone.shape[1])
                    expected = _logits(single, alone, None)
                    worst = max(worst, difference(expected[0], found[row], largest(expected)))
        except Exception as error:  # noqa: BLE001  # it becomes the cell
            outcome: Outcome = "refused" if isinstance(error, ValueError) else _kind(error)
            yield Cell(*where, "padding", outcome, reason=_line(error))
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


def _rounding(model: PreTrainedModel, cell: Cell) -> float:
    """Return how far rounding alone moves naive re-feed, fed what the cell was: the farthest of `ROUNDINGS`.

    The model's own, against the same weights in float32, and those in float32 with each weight moved by up to a step of
    the dtype: where two experts score almost the same, one rounding changes the choice and the next does not.
    """
    wide = copy.deepcopy(model).float()
    others = [model, *(_moved(wide, seed, torch.finfo(model.dtype).eps) for seed in range(ROUNDINGS - 1))]
    prompt = token_ids(2, cell.batch_size, N_PROMPT)
    if cell.scenario == "context":
        prompt = torch.cat([token_ids(1, cell.batch_size, N_DEPTH), prompt], dim=1)
    worst = 0.0
    for fed in _rows() if cell.scenario == "padding" else [prompt]:
        naives = [build_eagerly("naive", each) for each in (wide, *others)]
        for naive in naives:
            naive.prepare(fed.shape[0], fed.shape[1] + N_GEN, prompt_length=fed.shape[1])
        forced = None if cell.scenario == "padding" else naives[1].generate(fed, N_GEN)
        expected, *found = (_logits(naive, fed, None, forced) for naive in naives)
        worst = max(worst, *(difference(expected, each, largest(expected)) for each in found))
    return worst


def _moved(model: PreTrainedModel, seed: int, share: float) -> PreTrainedModel:
    """Copy `model` with every weight moved by up to this share of itself."""
    found, draws = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for weight in found.parameters():
        weight.mul_(1 + share * (2 * torch.rand(weight.shape, generator=draws) - 1))
    return found


def _logits(strategy: Strategy, prompt: Tensor, mask: Tensor | None, forced: Tensor | None = None) -> Tensor:
    """Logits `[batch, N_GEN, vocab]` of the same fed tokens, whatever the strategy chooses."""
    steps: list[Tensor] = []
    forced = token_ids(5, 1, N_GEN).expand(prompt.shape[0], -1) if forced is None else forced
    strategy.generate(prompt, N_GEN, lambda _, logits: steps.append(logits), forced=forced, attention_mask=mask)
    return torch.stack(steps, dim=1)


def _kind(error: Exception) -> Outcome:
    return "refused" if isinstance(error, REFUSALS) else "failed"


def _line(error: Exception) -> str:
    """The error in one line; of those that are no sentence for users, its class too."""
    text = " ".join(str(error).split())[:300]
    own = isinstance(error, (*REFUSALS, NonFiniteLogits, WrongShape, _Slow, ValueError))
    return text if own and text else f"{type(error).__name__}: {text}"


class _limit:  # noqa: N801  # a context manager
    """Raise `_Slow` in what takes longer than a cell may."""

    def __enter__(self) -> None:
        def stop(*_: object) -> None:
            raise _Slow(f"no end within {CELL_S} s of processor time")

        signal.signal(signal.SIGPROF, stop)
        signal.setitimer(signal.ITIMER_PROF, CELL_S)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
