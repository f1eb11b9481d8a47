"""`kvbench train`: checks what is asked for, shows the training as it goes, and tells what came of it."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Literal, get_args

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from bench.commands.flags import at_least, one
from bench.errors import DataError, UsageError
from bench.study.training_plot import loss_curve
from bench.tell.layout import markdown_table
from bench.tell.plots.style import save
from kvcache.learn import training_folder
from kvcache.learn.corpus import OWN_TEXT, TextError, TokenizerKind, lines_of, read_text
from kvcache.learn.training_folder import DamagedError, FolderError, Outcome, Settings

TrainingFormat = Literal["md", "json"]
TRAINING_FORMATS: tuple[TrainingFormat, ...] = get_args(TrainingFormat)
TOKENIZERS: tuple[TokenizerKind, ...] = get_args(TokenizerKind)

LEARNT_NATS = 0.1
"""A mean loss this close to the text's own entropy means that the text is known by heart."""
LONGEST_CONTEXT = 4096


def settings(
    context_length: int | None, tokenizer: str | None, steps: int | None, seed: int | None, n_threads: int
) -> Settings:
    """What is asked for, checked; None takes the default.

    Raises:
        UsageError: a value is not valid.
    """
    default = Settings()
    chosen = Settings(
        context_length=default.context_length if context_length is None else context_length,
        tokenizer=default.tokenizer if tokenizer is None else one("--tokenizer", tokenizer, TOKENIZERS),
        steps=default.steps if steps is None else steps,
        seed=default.seed if seed is None else seed,
        n_threads=n_threads,
    )
    if not 2 <= chosen.context_length <= LONGEST_CONTEXT:
        raise UsageError(
            f"--context-length {chosen.context_length}: give 2 to {LONGEST_CONTEXT} positions; in one, [SOS] is alone"
        )
    if not 0 <= chosen.seed < 2**32:
        raise UsageError(f"--seed {chosen.seed}: give an integer from 0 to 2**32 - 1")
    at_least("--steps", chosen.steps, 1)
    return chosen


def begin(folder: Path, text_file: Path | None, settings: Settings) -> None:
    """Write down in a new `folder` what is to be trained; nothing is written where anything is wrong.

    Raises:
        UsageError: the text is not valid, or the folder holds something.
    """
    try:
        text = OWN_TEXT if text_file is None else read_text(text_file)
        lines_of(text, str(text_file))
        training_folder.begin(folder, text, settings)
    except TextError as error:
        raise UsageError(f"--text: {error}") from error
    except FolderError as error:
        raise UsageError(f"--out: {error}") from error


def train(folder: Path) -> Outcome:
    """Train what was begun in `folder`, from where it was left, and draw its loss curve there.

    A training that is finished is left as it is.

    Raises:
        DataError: the folder holds no training, or a damaged one.
    """
    try:
        record, _ = training_folder.read(folder)
        if record.outcome is not None:
            if not (folder / "loss.png").exists():  # killed between its last two writes
                _draw(record.outcome, folder)
            return record.outcome
        from kvcache.learn import training

        with _Progress(record.settings.steps) as progress:
            outcome = training.train(folder, progress)
    except DamagedError as error:
        raise DataError(str(error)) from error
    except BaseException:
        print(f"kvbench: go on with: kvbench train --resume {folder}", file=sys.stderr)
        raise
    _draw(outcome, folder)
    return outcome


def _draw(outcome: Outcome, folder: Path) -> None:
    save(loss_curve(outcome.losses, outcome.entropy, _setting(outcome)), folder / "loss")


def render(outcome: Outcome, folder: Path, form: TrainingFormat) -> str:
    """What came of a training, as a table of two columns and the folder's path, or as one JSON object."""
    excess = outcome.loss - outcome.entropy
    if form == "json":
        fields = {**msgspec.to_builtins(outcome), "excess": excess, "folder": str(folder)}
        return json.dumps(fields, indent=2) + "\n"
    lines = {
        "texts": f"{outcome.n_texts} ({outcome.n_cut} cut at the context length)",
        "targets": f"{outcome.n_targets:,} tokens",
        "parameters": f"{outcome.n_parameters:,}",
        "shape of every batch": f"{outcome.shape[0]} texts x {outcome.shape[1]} positions",
        "mean loss": f"{outcome.loss:.4f} nats per target",
        "the text's own entropy": f"{outcome.entropy:.4f} nats per target",
        "difference": f"{excess:.4f} nats per target",
    }
    return f"{markdown_table(lines.items(), ['training', 'result'])}\n{folder}\n"


def advice(outcome: Outcome) -> str | None:
    """What to do where the text was not learnt by heart, or was cut."""
    excess = outcome.loss - outcome.entropy
    if excess > LEARNT_NATS:
        return f"the mean loss is {excess:.2f} nats above the text's own entropy: give more --steps for less"
    if outcome.n_cut:
        return f"{outcome.n_cut} of {outcome.n_texts} texts lost their end: give a larger --context-length to keep it"
    return None


def _setting(outcome: Outcome) -> str:
    batch = " x ".join(map(str, outcome.shape))
    return f"GPT-2 with {outcome.n_parameters:,} parameters, {outcome.n_texts} texts, every batch {batch} tokens"


class _Progress:
    """The loss on standard error as it falls: beside a bar on a terminal, ten lines elsewhere."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._console = Console(file=sys.stderr)  # this file: transformers is silenced by putting another in its place
        self._bar = Progress(
            TextColumn("loss {task.fields[loss]}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task("", total=steps, loss="")
        self._tenth = 0

    def __call__(self, step: int, loss: float) -> None:
        if self._console.is_terminal:
            self._bar.update(self._task, completed=step, loss=f"{loss:.4f}")
        elif 10 * step // self._steps > self._tenth:
            self._tenth = 10 * step // self._steps
            self._console.print(f"step {step} of {self._steps}: loss {loss:.4f}", highlight=False)

    def __enter__(self) -> _Progress:
        self._started = time.monotonic()
        if self._console.is_terminal:
            self._bar.start()
        else:
            self._console.print(f"training {self._steps} steps", highlight=False)
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._bar.stop()
        self._console.print(f"trained for {time.monotonic() - self._started:.0f} s", highlight=False)
