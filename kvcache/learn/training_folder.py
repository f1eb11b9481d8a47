"""The folder of a training: its settings, its text, and the checkpoints that were written completely.

DIR/config.json, model.safetensors, tokenizer.json, ...   the result: an ordinary checkpoint folder
DIR/training.json    the settings (written first) and the outcome (written last)
DIR/text.txt         the text, so that a resumed training needs nothing else
DIR/checkpoints/     the Trainer's; a marker in each, written last, says that it is complete
"""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec

from kvcache.files import write_atomically
from kvcache.learn.corpus import TokenizerKind

SCHEMA_VERSION = 1
_RECORD, _TEXT, _CHECKPOINTS, _MARKER = "training.json", "text.txt", "checkpoints", "kvbench-complete"
_PICKLED_ARGUMENTS = "training_args.bin"
"""The Trainer pickles its arguments into every checkpoint and never reads them again."""

OnLog = Callable[[int, float], None]
"""Called with the step and the mean loss, in nats per target, since the call before."""


class FolderError(Exception):
    """No training can begin in the folder; the message is one line."""


class DamagedError(Exception):
    """What is stored in the folder is missing or damaged; the message is one line."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that decides a training, so that resuming it needs nothing but its folder."""

    context_length: int = 64
    """Input positions of every text; the one static shape is `[batch_size, context_length]`."""
    steps: int = 80
    seed: int = 0
    tokenizer: TokenizerKind = "word"
    n_threads: int = 1
    """A sum depends on how threads share it: with the same number a resumed training is equal bit by bit."""
    batch_size: int = 16
    """Texts per step; all of them if there are fewer."""
    learning_rate: float = 2e-3
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """Result of a finished training."""

    loss: float
    """Mean of -log(probability of the target) over all targets of the text, in nats, by the finished model."""
    entropy: float
    """Entropy of the text's own targets, in nats: the lowest loss that any model can reach."""
    n_texts: int
    n_cut: int
    """Texts that were longer than the context and lost their end."""
    n_targets: int
    n_parameters: int
    shape: tuple[int, int]
    """`[texts, context_length]` of every batch in training: the same one, however long the texts are."""
    losses: tuple[tuple[int, float], ...]
    """(step, mean loss since the entry before it)."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """The content of training.json."""

    schema_version: int = SCHEMA_VERSION
    settings: Settings
    text_sha256: str
    outcome: Outcome | None = None
    """None until the training is over."""


def begin(folder: Path, text: str, settings: Settings) -> None:
    """Create `folder` and store the settings and the text of a training in it.

    Raises:
        FolderError: it is not empty (and is left as it is), or cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise FolderError(f"{folder} is a file; give a new folder")
    if folder.is_dir() and any(folder.iterdir()):
        own = (folder / _RECORD).is_file()
        advice = "to continue the training in it use --resume, or give a new folder" if own else "give a new folder"
        raise FolderError(f"the folder {folder} is not empty and nothing is overwritten; {advice}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _TEXT).write_bytes(text.encode())
        write_record(folder, Record(settings=settings, text_sha256=_sha256(text.encode())))
    except OSError as error:
        raise FolderError(f"{folder} cannot be written ({error.strerror})") from None


def read(folder: Path) -> tuple[Record, str]:
    """Return the record of the training in `folder`, and its text.

    Raises:
        DamagedError: there is no training, or it is damaged or was written by a newer kvbench.
    """
    try:
        record = msgspec.json.decode((folder / _RECORD).read_bytes(), type=Record)
        content = (folder / _TEXT).read_bytes()
    except OSError:
        raise DamagedError(f"{folder} holds no training of kvbench ({_RECORD} and {_TEXT} are not there)") from None
    except msgspec.MsgspecError as error:
        raise DamagedError(f"{folder / _RECORD} is damaged ({error})") from None
    if record.schema_version > SCHEMA_VERSION:
        raise DamagedError(f"{folder / _RECORD} was written by a newer kvbench (schema {record.schema_version})")
    if _sha256(content) != record.text_sha256:
        raise DamagedError(f"{folder / _TEXT} is not the text that the training began with")
    return record, content.decode()


def write_record(folder: Path, record: Record) -> None:
    """Replace training.json atomically."""
    write_atomically(folder / _RECORD, msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")


def checkpoints(folder: Path) -> Path:
    """Return the folder of the Trainer's checkpoints."""
    return folder / _CHECKPOINTS


def mark_complete(folder: Path, step: int) -> None:
    """Mark the checkpoint of `step` as complete; called when all its files are written."""
    checkpoint = checkpoints(folder) / f"checkpoint-{step}"
    (checkpoint / _PICKLED_ARGUMENTS).unlink(missing_ok=True)
    write_atomically(checkpoint / _MARKER, b"")


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the latest complete checkpoint (None: there is none), and delete those that a kill left incomplete."""
    from transformers.trainer_utils import get_last_checkpoint

    for checkpoint in checkpoints(folder).glob("checkpoint-*"):
        if not (checkpoint / _MARKER).exists():
            shutil.rmtree(checkpoint)
    newest = get_last_checkpoint(str(checkpoints(folder))) if checkpoints(folder).exists() else None
    return None if newest is None else Path(newest)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
