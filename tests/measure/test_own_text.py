"""The user's own text: as many tokens as the grid needs by each model's tokenizer, and what is wrong with it."""

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.case import Case
from bench.errors import UsageError
from bench.measure import own_text
from bench.measure.own_text import read_text
from kvcache import models
from tests.handmade import grid, make_case, make_plan


@pytest.fixture(autouse=True)
def _small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of 300 words and 150 positions whose tokens are the words' lengths."""

    def tokenizer(text: str, **_: Any) -> dict[str, list[int]]:
        if "?" in text:
            raise KeyError("?")
        return {"input_ids": [len(word) for word in text.split()]}

    monkeypatch.setattr(models, "load_tokenizer", lambda spec: tokenizer)
    monkeypatch.setattr(own_text, "describe", lambda *_: SimpleNamespace(max_positions=150, vocab_size=300))


def read(cases: list[Case], content: bytes, folder: Path) -> Any:
    path = folder / "mine.txt"
    path.write_bytes(content)
    return read_text(path, [make_plan(case) for case in cases])


def test_a_text_is_cut_to_what_the_longest_case_and_the_largest_batch_need(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + b"a bb ccc " * 200
    cases = [*grid(["dynamic", "fp8"], [8, 16]), make_case("fp8", 8, batch_size=2)]
    text = read(cases, content, tmp_path)
    assert text.digest == hashlib.sha256(content).hexdigest()
    assert text.tokens == {"smollm2-135m": ([1, 2, 3] * 92)[: 2 * (8 + 129)]}
    assert len(read(grid(["fp8"], [100]), content, tmp_path).tokens["smollm2-135m"]) == 150  # all positions


@pytest.mark.parametrize(
    ("strategy", "content", "says"),
    [
        ("fp8", b"too short", "has 2 tokens of smollm2-135m, this grid needs 137"),
        ("fp8", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer in place of the text; run"),
        ("fp8", b"\xff\xfe\x00", "not UTF-8 text (byte 0)"),
        ("fp8", b"so what?", "the model's tokenizer has no token for what?"),
        ("fp8", b"w" * 300 + b" a" * 200, "its token 300 lies outside the model's embedding of 300 rows"),
        ("dynamic", b"a " * 200, "no strategy of the grid is lossy"),
    ],
)
def test_what_is_wrong_with_a_text(strategy: str, content: bytes, says: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        read([make_case(strategy, 8)], content, tmp_path)
    assert str(refused.value).startswith(f"--text {tmp_path / 'mine.txt'}: ")
    assert says in str(refused.value)


def test_a_text_that_is_missing_and_a_model_without_a_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_text(tmp_path, [make_plan(make_case("fp8", 8))])

    def none(spec: str) -> None:
        raise models.ModelError("has no tokenizer")

    monkeypatch.setattr(models, "load_tokenizer", none)
    with pytest.raises(UsageError, match="--model smollm2-135m: has no tokenizer"):
        read([make_case("fp8", 8)], b"a " * 200, tmp_path)
