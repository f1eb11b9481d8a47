"""Runs every causal language model of transformers, shrunken, by every strategy, and says which is right (an hour).

Each is measured as kvbench does it: against the parallel forward, or naive re-feed where a forward is not
prefix-stable; in float32 and bfloat16, at batch 1 and 3, with a whole prompt, after a context, in three chunks, and
left-padded. Writes results/examples/architectures.csv and docs/architectures.md.
"""

import argparse
import fnmatch
import multiprocessing
import signal
import sys
import warnings
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from kvcache.caches.contract import Unsupported
from kvcache.proof.tokens import NonFiniteLogits, NotRepeatable, Reference, WrongShape, agreement, reference
from kvcache.strategies.strategy import Strategy
from kvcache.strategies.tolerance import difference, largest, tolerance
from tests.studies.architecture_configs import TYPES, shrunken
from tests.studies.architectures_page import write
from tests.tiny import EVERYWHERE, build_eagerly, token_ids

TREE = Path(__file__).resolve().parents[2]
TABLE = TREE / "results" / "examples" / "architectures.csv"
N_PROMPT, N_GEN, N_DEPTH = 12, 5, 8
"""Prompt and context cross the windows, chunks and top-k of 8, the convolutions of 4 and the longrope switch at 16."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BATCH_SIZES = (1, 3)
REFUSALS = (Unsupported, NotRepeatable)
"""How a strategy says that it does not take a model; a padded prompt is refused by a ValueError."""
LONGEST_S = 600
"""Between two cells of one type."""
CELL_S = 60

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
        wrong: set[str] = set()  # and said to be so
        for batch_size in BATCH_SIZES:
            for scenario, n_depth in (("whole", 0), ("context", N_DEPTH)):
                for cell in _generated(model, model_type, dtype, batch_size, scenario, n_depth):  # type: ignore[arg-type]
                    if cell.outcome == "false" or cell.prefix_stable is False:
                        wrong.add(cell.strategy)
                    yield cell
        yield from _padded(model, model_type, dtype, wrong)


def _generated(
    model: PreTrainedModel, model_type: str, dtype: str, batch_size: int, scenario: Scenario, n_depth: int
) -> Iterator[Cell]:
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
    short, long = token_ids(3, 1, 5), token_ids(4, 1, 9)
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


def _padding_outcome(worst: float, model: PreTrainedModel, *, known: bool) -> Outcome:
    """Judge a padded row; twice the tolerance is still rounding: both rows have it, and add in another order."""
    if worst <= tolerance(model):
        return "right"
    if worst <= 2 * tolerance(model):
        return "tie"
    return "false" if known else "silent"


def _logits(strategy: Strategy, prompt: Tensor, mask: Tensor | None) -> Tensor:
    """Logits `[batch, N_GEN, vocab]` of the same fed tokens, whatever the strategy chooses."""
    steps: list[Tensor] = []
    forced = token_ids(5, 1, N_GEN).expand(prompt.shape[0], -1)
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
            raise _Slow(f"no end within {CELL_S} s")

        signal.signal(signal.SIGALRM, stop)
        signal.alarm(CELL_S)

    def __exit__(self, *_: object) -> None:
        signal.alarm(0)


def _child(model_type: str, dtypes: Sequence[str], out: Connection) -> None:
    warnings.simplefilter("ignore")
    torch.compiler.set_stance("force_eager")  # `compiled` runs its code as it is: a trace takes seconds
    for cell in cells(model_type, dtypes):
        out.send(cell)
    out.send(None)


def tried(model_type: str, dtypes: Sequence[str]) -> list[Cell]:
    """All cells of one type, from a process of its own; what it had said when it died or was stopped, and that."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_child, args=(model_type, dtypes, sender), daemon=True)
    process.start()
    sender.close()
    found: list[Cell] = []
    try:
        while receiver.poll(LONGEST_S):
            cell = receiver.recv()
            if cell is None:
                break
            found.append(cell)
        else:
            found.append(Cell(model_type, "", 0, "", "", "failed", reason=f"no cell within {LONGEST_S} s"))
    except EOFError:
        process.join()
        found.append(Cell(model_type, "", 0, "", "", "failed", reason=f"the process ended with {process.exitcode}"))
    process.kill()
    process.join()
    return found


def main() -> None:
    """Try all types, or those of --only, and write table and page."""
    parser = argparse.ArgumentParser(prog="nox -s study -- architectures", description=__doc__)
    parser.add_argument("--only", action="append", metavar="TYPE", help="Try this one again (repeatable; *, ?).")
    parser.add_argument("--jobs", type=int, default=2, help="Types at a time.")
    parser.add_argument("--missing", action="store_true", help="Try those alone that the stored table lacks.")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="Which, separated by commas.")
    parser.add_argument("--page", action="store_true", help="Write docs/architectures.md from the stored table alone.")
    asked = parser.parse_args()
    types = (
        []
        if asked.page
        else [each for each in TYPES if any(fnmatch.fnmatch(each, name) for name in asked.only or ["*"])]
    )
    if not types and not asked.page:
        parser.error(f"--only {' '.join(asked.only)}: valid: {', '.join(TYPES)}")
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    stored = pd.read_csv(TABLE, keep_default_na=False) if TABLE.exists() else pd.DataFrame(columns=["model_type"])
    if asked.missing:
        types = [each for each in types if each not in set(stored["model_type"])]
    dtypes = asked.dtypes.split(",")
    with ThreadPoolExecutor(asked.jobs) as pool:
        answers = pool.map(lambda each: tried(each, dtypes), types)
        for done, (model_type, found) in enumerate(zip(types, answers, strict=True), 1):
            new = pd.DataFrame([asdict(cell) for cell in found])
            stored = pd.concat([stored[stored["model_type"] != model_type], new.astype(object).fillna("")])
            outcomes = new["outcome"].value_counts()
            said = ", ".join(f"{count} {name}" for name, count in outcomes.items())
            print(f"{done} of {len(types)} {model_type}: {said}", file=sys.stderr, flush=True)
            stored = stored.sort_values("model_type", kind="stable")
            stored.to_csv(TABLE, index=False, lineterminator="\n", float_format="%.2g")
    page = write(stored)
    print(page)
    if (stored["outcome"] == "silent").any():
        raise SystemExit(1)


if __name__ == "__main__":
    main()
