"""The user's own text: read, and cut into the tokens of each model that judges lossy strategies by it."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.errors import UsageError
from bench.manifest import CasePlan, TextFile
from bench.measure.plan import describe
from kvcache import models
from kvcache.models.folder import LFS_POINTER
from kvcache.strategies.catalogue import is_lossy

NAMED_WORDS = 5
"""Words without a token that an error names at most."""


def read_text(path: Path, plans: Sequence[CasePlan]) -> TextFile:
    """Read a text and return its first tokens by every model of `plans` with a lossy case, as many as those need.

    Raises:
        UsageError: it cannot be read, it is no UTF-8, no case is judged by it, a model has no tokenizer or not every
            token, or the text is too short.
    """
    from kvcache.proof.judging import text_length  # imports torch, which the plan's models did already

    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"--text {path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--text {path}: not UTF-8 text (byte {error.start})") from error
    if text.startswith(LFS_POINTER):
        raise UsageError(f"--text {path}: a Git LFS pointer in place of the text; run `git lfs pull`")
    needed: dict[str, int] = {}
    for case in (item.case for item in plans if is_lossy(item.case.strategy)):
        positions = describe(case.model, case.attn_implementation).max_positions
        n = case.batch_size * text_length(case.n_depth + case.n_prompt, positions)
        needed[case.model] = max(n, needed.get(case.model, 0))
    if not needed:
        raise UsageError(f"--text {path}: no strategy of the grid is lossy, so nothing is judged by it")
    tokens = {model: _tokens(path, text, model, n) for model, n in needed.items()}
    return TextFile(path=str(path), digest=hashlib.sha256(content).hexdigest(), tokens=tokens)


def _tokens(path: Path, text: str, model: str, n: int) -> list[int]:
    """Return the first `n` tokens of `text` by the tokenizer of `model`."""
    try:
        tokenizer = models.load_tokenizer(model)
    except models.ModelError as error:
        raise UsageError(f"--text {path}: --model {model}: {error}") from error
    ids = encode(text, tokenizer, describe(model, "").vocab_size, f"--text {path}", add_special_tokens=False)
    if len(ids) < n:
        raise UsageError(f"--text {path}: has {len(ids)} tokens of {model}, this grid needs {n}; give a longer text")
    return ids[:n]


def encode(
    text: str, tokenizer: Callable[..., Any], vocab_size: int, flag: str, *, add_special_tokens: bool = True
) -> list[int]:
    """Return the token ids of a text that was given by `flag`.

    Raises:
        UsageError: the tokenizer has no token for a word, or one that the model's `vocab_size` rows do not hold.
    """
    options = {"add_special_tokens": add_special_tokens, "verbose": False}
    try:
        ids: list[int] = tokenizer(text, **options)["input_ids"]
    except Exception as error:
        unknown = [word for word in dict.fromkeys(text.split()) if not _knows(tokenizer, word)]
        reason = ", ".join(unknown[:NAMED_WORDS]) or error
        raise UsageError(f"{flag}: the model's tokenizer has no token for {reason}") from error
    if ids and max(ids) >= vocab_size:
        raise UsageError(
            f"{flag}: its token {max(ids)} lies outside the model's embedding of {vocab_size} rows; the tokenizer does "
            "not belong to this model"
        )
    return ids


def _knows(tokenizer: Callable[..., Any], word: str) -> bool:
    try:
        tokenizer(word)
    except Exception:  # noqa: BLE001  # the tokenizers library raises no narrower one
        return False
    return True
