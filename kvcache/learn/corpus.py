"""Texts as the study note trains on them: [SOS] and [EOS] around each, shifted by one, cut or padded to one shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kvcache.models.folder import LFS_POINTER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SOS, EOS, PAD = "[SOS]", "[EOS]", "[PAD]"
SPECIAL_TOKENS = (PAD, SOS, EOS)
"""In the order of their ids, from 0."""

IGNORED = -100
"""The target of a padded position; cross-entropy leaves it out."""

TokenizerKind = Literal["word", "bpe"]
BPE_VOCAB_SIZE = 2048

OWN_TEXT = """\
Love that can quickly seize the gentle heart
The rain that fell at night is gone by noon
Small birds can carry summer on their wings
Love that can quickly seize the gentle heart
No river asks the sea how deep it is
Old stones remember what the wind forgets
Slow hands can quickly learn a gentle song
Love that can quickly seize the gentle heart
Every step looks back at those before it
Morning begins before the heart can see
Words that were kept need not be said again
A letter that was never sent still waits
"""
"""The study note's line stands here three times, so that a greedy model begins with it, and none else begins so."""


class TextError(Exception):
    """The text cannot be trained on; the message is one line that names the file and says what is wrong."""


def read_text(path: Path) -> str:
    """Return the content of a UTF-8 file.

    Raises:
        TextError: there is no such file, it cannot be read, or it is not UTF-8.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 (byte {error.start} is {error.object[error.start]:#04x})") from None
    except OSError as error:
        raise TextError(f"{path}: {error.strerror}") from None
    if text.startswith(LFS_POINTER):
        raise TextError(f"{path} is a Git LFS pointer in place of the text; run `git lfs pull`")
    return text


def lines_of(text: str, name: str) -> list[str]:
    """Return the texts to train on: one a line, white space around it cut off, empty ones left out.

    Raises:
        TextError: nothing is left, or a line has one of the special tokens in it.
    """
    lines = [line.strip() for line in text.split("\n")]
    if not any(lines):
        raise TextError(f"{name} {'holds nothing but white space' if text else 'is empty'}; give at least one line")
    for number, line in enumerate(lines, 1):
        special = next((token for token in SPECIAL_TOKENS if token in line), None)
        if special is not None:
            raise TextError(f"{name}, line {number} has {special} in it, which training puts around each line itself")
    return [line for line in lines if line]


def build_tokenizer(lines: Iterable[str], kind: TokenizerKind) -> PreTrainedTokenizerFast:
    """Make a tokenizer from `lines`: whole words between white space, or byte-level BPE of at most 2,048 tokens.

    As in the study note it puts [SOS] before a text, so that an empty prompt is [SOS] alone. Words have no token for
    unknown ones (nothing would train it), so encoding one is an error; byte-level BPE knows every text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = list(SPECIAL_TOKENS)
    trainer: trainers.Trainer
    if kind == "word":
        tokenizer = Tokenizer(models.WordLevel())
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer = trainers.WordLevelTrainer(special_tokens=special, show_progress=False, vocab_size=2**31)
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=BPE_VOCAB_SIZE, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SOS} $A", special_tokens=[(SOS, tokenizer.token_to_id(SOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=SOS, eos_token=EOS, pad_token=PAD)


def special_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, int, int]:
    """Return the ids of [SOS], [EOS] and [PAD]."""
    sos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    return sos, eos, pad


@dataclass(frozen=True)
class Corpus(Dataset[dict[str, Tensor]]):
    """Texts in one static shape, `[texts, context_length]` each; an item is a row of all three."""

    input_ids: Tensor
    """`tokens[:-1]`, padded on the right."""
    labels: Tensor
    """`tokens[1:]`: at each position the token that follows it; IGNORED at the padding."""
    attention_mask: Tensor
    """1 at tokens, 0 at the padding."""
    n_cut: int
    """Texts that were longer than the context and lost their end."""
    entropy: float
    """Of a target given all tokens before it, in nats, over the texts as they stand here: no model's mean loss on
    them can be lower."""

    @property
    def n_targets(self) -> int:
        """Count the positions that the loss counts."""
        return int(self.attention_mask.sum())

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int | slice) -> dict[str, Tensor]:
        return {name: getattr(self, name)[index] for name in ("input_ids", "labels", "attention_mask")}


def build_corpus(lines: Iterable[str], tokenizer: PreTrainedTokenizerFast, context_length: int) -> Corpus:
    """Put [SOS] before and [EOS] after each text, shift the target by one, and cut or pad to `context_length`.

    >>> corpus = build_corpus(["Love that can"], build_tokenizer(["Love that can"], "word"), context_length=6)
    >>> corpus.input_ids.tolist(), corpus.labels.tolist()
    ([[1, 3, 5, 4, 0, 0]], [[3, 5, 4, 2, -100, -100]])
    """
    sos, eos, pad = special_ids(tokenizer)
    texts = [[sos, *tokenizer(line, add_special_tokens=False)["input_ids"], eos] for line in lines]
    kept = [tokens[: context_length + 1] for tokens in texts]

    def padded(rows: Iterable[Sequence[int]], filler: int) -> Tensor:
        return torch.tensor([[*row, *[filler] * (context_length - len(row))] for row in rows])

    return Corpus(
        input_ids=padded((tokens[:-1] for tokens in kept), pad),
        labels=padded((tokens[1:] for tokens in kept), IGNORED),
        attention_mask=padded(([1] * (len(tokens) - 1) for tokens in kept), 0),
        n_cut=sum(len(tokens) > context_length + 1 for tokens in texts),
        entropy=entropy_per_target(kept),
    )


def entropy_per_target(texts: Iterable[Sequence[int]]) -> float:
    """Return the mean over all targets of -log(share of the texts with the same beginning that go on so), in nats.

    Three texts that differ after the first token, one of them from two equal ones: their two other targets are certain.

    >>> round(entropy_per_target([[1, 3, 2], [1, 3, 2], [1, 4, 2]]), 4)  # (2 log 3/2 + log 3) / 6
    0.3183
    """
    nodes: dict[tuple[int, int], int] = {}  # a beginning and the next token -> the longer beginning: a prefix tree
    passed: Counter[int] = Counter()
    taken: Counter[tuple[int, int]] = Counter()
    for tokens in texts:
        node = 0
        for token in tokens[1:]:
            passed[node] += 1
            taken[node, token] += 1
            node = nodes.setdefault((node, token), len(nodes) + 1)
    return sum(count * log(passed[node] / count) for (node, _), count in taken.items()) / passed.total()
