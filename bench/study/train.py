"""`kvbench train`: checks text and folder, shows the loss during training, and reports the result."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.errors import DataError, UsageError
from bench.store.derived import Derived
from bench.tell.formats import DocumentFormat
from bench.tell.layout import markdown_table
from kvcache.learn import training_folder
from kvcache.learn.corpus import OWN_TEXT, TextError, lines_of, read_text
from kvcache.learn.training_folder import DamagedError, FolderError, OnLog, Outcome, Settings

LEARNT_NATS = 0.1
"""A mean loss within so much of the text's own entropy means that the text is known by heart."""


def begin(folder: Path, text_file: Path | None, settings: Settings) -> None:
    """Create `folder`, a new or an empty one, and store the settings and the text in it; nothing if any is wrong.

    `text_file` is UTF-8, one text per line; None takes the twelve lines that come with kvbench.

    Raises:
        UsageError: the text is not valid, or the folder is not empty.
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
    """Train in `folder` from the newest checkpoint, or from the start, and draw the loss curve there.

    A finished training is left as it is.

    Raises:
        DataError: the folder holds no training, or its record or text is damaged.
    """
    try:
        record, _ = training_folder.read(folder)
        if record.outcome is not None:
            if not (folder / "loss.png").exists():  # killed between its last two writes
                _draw(record.outcome, folder)
            return record.outcome
        from kvcache.learn import training

        with _progress(record.settings.steps) as show:
            outcome = training.train(folder, show)
    except DamagedError as error:
        raise DataError(str(error)) from error
    except BaseException:
        print(f"kvbench: continue with: kvbench train --resume {folder}", file=sys.stderr)
        raise
    _draw(outcome, folder)
    return outcome


def _draw(outcome: Outcome, folder: Path) -> None:
    derived = Derived()
    with derived.trying("loss.png and loss.svg"):
        from bench.tell.plots.style import own_settings, save
        from bench.tell.plots.training import loss_curve

        with own_settings():
            save(loss_curve(outcome.losses, outcome.entropy, _setting(outcome)), folder / "loss")
    for line in derived.lines():
        print(line, file=sys.stderr)


def render(outcome: Outcome, folder: Path, form: DocumentFormat) -> str:
    """Return the result of a training as a table of two columns and the folder's path, or as one JSON object."""
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
    """Return one line of advice if the text was not learnt by heart, or was cut; else None."""
    excess = outcome.loss - outcome.entropy
    if excess > LEARNT_NATS:
        return f"the mean loss is {excess:.2f} nats above the text's own entropy: give more --steps to lower it"
    if outcome.n_cut:
        return f"{outcome.n_cut} of {outcome.n_texts} texts lost their end: give a larger --context-length to keep it"
    return None


def _setting(outcome: Outcome) -> str:
    batch = " x ".join(map(str, outcome.shape))
    return f"GPT-2 with {outcome.n_parameters:,} parameters, {outcome.n_texts} texts, every batch {batch} tokens"


@contextmanager
def _progress(steps: int) -> Iterator[OnLog]:
    """Show the loss on standard error as it falls: beside a bar on a terminal, on ten lines elsewhere."""
    console = Console(file=sys.stderr)  # this file: transformers is silenced by putting another in its place
    columns = (BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bar = Progress(TextColumn("{task.description}"), *columns, console=console, disable=not console.is_terminal)
    task = bar.add_task(f"training {steps} steps", total=steps)
    tenth = 0

    def show(step: int, loss: float) -> None:
        nonlocal tenth
        bar.update(task, completed=step, description=f"loss {loss:.4f}")
        if bar.disable and 10 * step // steps > tenth:
            tenth = 10 * step // steps
            console.print(f"step {step} of {steps}: loss {loss:.4f}", highlight=False)

    with bar:
        yield show
