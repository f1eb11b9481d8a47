"""The folder of a training: what was asked for, the text, and the checkpoints that this command itself wrote whole.

DIR/config.json, model.safetensors, tokenizer.json, ...   the result: an ordinary checkpoint folder
DIR/training.json    what was asked for (written first) and what came of it (written last)
DIR/text.txt         what is trained on, so that a resumed training needs nothing else
DIR/checkpoints/     the Trainer's; each with a seal, the SHA-256 of every file, written last
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from kvcache.learn.corpus import TokenizerKind

SCHEMA_VERSION = 1
_RECORD, _TEXT, _CHECKPOINTS, _SEAL = "training.json", "text.txt", "checkpoints", "kvbench-seal.json"
_PICKLED_ARGUMENTS = "training_args.bin"
"""The Trainer pickles its arguments into every checkpoint and never reads them again."""

OnLog = Callable[[int, float], None]
"""Called with the step and the mean loss, in nats per target, since the call before."""


class FolderError(Exception):
    """The folder cannot be begun in; the message is one line."""


class DamagedError(Exception):
    """What is stored in the folder is missing, damaged, or not this command's own; the message is one line."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """All that decides a training, so that resuming it needs nothing but its folder."""

    context_length: int = 64
    """Positions of input, of every text: the one static shape is `[batch_size, context_length]`."""
    steps: int = 80
    seed: int = 0
    tokenizer: TokenizerKind = "word"
    n_threads: int = 1
    """Sums depend on how they are shared between threads; equal threads make a resumed training equal to the bit."""
    batch_size: int = 16
    """Texts in a step; all of them where there are fewer."""
    learning_rate: float = 2e-3
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a training."""

    loss: float
    """Mean of -log(probability of the target) over all targets of the text, in nats, by the finished model."""
    entropy: float
    """Of the text's own targets, in nats: the lowest loss that any model can reach."""
    n_texts: int
    n_cut: int
    """Texts that were longer than the context and lost their end."""
    n_targets: int
    n_parameters: int
    shape: tuple[int, int]
    """`[texts, context_length]` of every batch that the model saw in training: one, however long the texts."""
    losses: tuple[tuple[int, float], ...]
    """(step, mean loss since the entry before it)."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """The content of training.json."""

    schema_version: int = SCHEMA_VERSION
    settings: Settings
    text_sha256: str
    outcome: Outcome | None = None
    """None until the training is over."""


class _Seal(msgspec.Struct, frozen=True, kw_only=True):
    training_sha256: str
    """Of training.json, which stays as it is while the training lasts."""
    files_sha256: dict[str, str]


def begin(folder: Path, text: str, settings: Settings) -> None:
    """Make `folder` and write down what is to be trained, and on what.

    Raises:
        FolderError: something is there already; it is left as it is.
    """
    if folder.exists() and not folder.is_dir():
        raise FolderError(f"{folder} is a file; give a new folder")
    if folder.is_dir() and any(folder.iterdir()):
        own = (folder / _RECORD).is_file()
        advice = "to go on with the training in it use --resume; else give a new one" if own else "give a new one"
        raise FolderError(f"the folder {folder} is not empty and nothing is overwritten; {advice}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _TEXT).write_bytes(text.encode())
        write_record(folder, Record(settings=settings, text_sha256=_sha256(text.encode())))
    except OSError as error:
        raise FolderError(f"{folder} cannot be written ({error.strerror})") from None


def read(folder: Path) -> tuple[Record, str]:
    """What was asked for in `folder`, and its text.

    Raises:
        DamagedError: there is no training, or it is damaged or of a newer kvbench.
    """
    try:
        record = msgspec.json.decode((folder / _RECORD).read_bytes(), type=Record)
        content = (folder / _TEXT).read_bytes()
    except OSError:
        raise DamagedError(f"{folder} holds no training of kvbench ({_RECORD} and {_TEXT} are not there)") from None
    except msgspec.MsgspecError as error:
        raise DamagedError(f"{folder / _RECORD} is damaged ({error})") from None
    if record.schema_version > SCHEMA_VERSION:
        raise DamagedError(f"{folder / _RECORD} is of a newer kvbench (schema {record.schema_version})")
    if _sha256(content) != record.text_sha256:
        raise DamagedError(f"{folder / _TEXT} is not the text that the training began with")
    return record, content.decode()


def write_record(folder: Path, record: Record) -> None:
    """Replace training.json in one go."""
    _write(folder / _RECORD, _json(record))


def checkpoints(folder: Path) -> Path:
    """Where the Trainer keeps its checkpoints."""
    return folder / _CHECKPOINTS


def seal(folder: Path, step: int) -> None:
    """Say of the checkpoint of `step` that it is whole, and of this training: written when all its files are there."""
    checkpoint = checkpoints(folder) / f"checkpoint-{step}"
    (checkpoint / _PICKLED_ARGUMENTS).unlink(missing_ok=True)
    _write(checkpoint / _SEAL, _json(_seal(folder, checkpoint)))


def newest_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint that was sealed; one without a seal, which a kill cut short, counts for nothing.

    Raises:
        DamagedError: its files are not those that this training wrote.
    """
    sealed = [path.parent for path in checkpoints(folder).glob(f"checkpoint-*/{_SEAL}")]
    newest = max(sealed, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)
    if newest is not None and (newest / _SEAL).read_bytes() != _json(_seal(folder, newest)):
        raise DamagedError(f"{newest} is not as this training wrote it; remove it to resume from an earlier checkpoint")
    return newest


def _seal(folder: Path, checkpoint: Path) -> _Seal:
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and not path.name.startswith(_SEAL)]
    return _Seal(
        training_sha256=_sha256((folder / _RECORD).read_bytes()),
        files_sha256={path.relative_to(checkpoint).as_posix(): _sha256(path.read_bytes()) for path in files},
    )


def _json(value: msgspec.Struct) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all, also where the process is killed on the way."""
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
