"""Texts in one static shape: cut, padded, shifted by one; tokenizers that give back what they took; the entropy."""

from collections import Counter
from math import log
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.learn.corpus import (
    IGNORED,
    OWN_TEXT,
    SPECIAL_TOKENS,
    TextError,
    build_corpus,
    build_tokenizer,
    entropy_per_target,
    lines_of,
    read_text,
)

PAD, SOS, EOS = range(3)
WORDS = ["love", "that", "can", "quickly", "seize"]
LINES = st.lists(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=7).map(" ".join),
    min_size=1,
    max_size=8,
)


@settings(max_examples=25)
@given(lines=LINES, context_length=st.integers(2, 9))
def test_rows_are_the_texts_cut_or_padded_and_shifted(lines: list[str], context_length: int) -> None:
    tokenizer = build_tokenizer(lines, "word")
    corpus = build_corpus(lines, tokenizer, context_length)
    assert {tuple(rows.shape) for rows in (corpus.input_ids, corpus.labels, corpus.attention_mask)} == {
        (len(lines), context_length)
    }
    for line, row in zip(lines, corpus, strict=False):
        words = tokenizer.convert_tokens_to_ids(line.split())
        whole = [SOS, *words, EOS]
        n = min(len(whole) - 1, context_length)
        assert row["attention_mask"].tolist() == [1] * n + [0] * (context_length - n)
        assert row["input_ids"].tolist() == whole[:n] + [PAD] * (context_length - n)
        assert row["labels"].tolist() == whole[1 : n + 1] + [IGNORED] * (context_length - n)
        assert row["labels"].tolist()[: n - 1] == row["input_ids"].tolist()[1:n]  # shifted by one
    assert corpus.n_cut == sum(len(line.split()) + 1 > context_length for line in lines)
    assert corpus.n_targets == sum(min(len(line.split()) + 1, context_length) for line in lines)


@settings(max_examples=25)
@given(lines=LINES)
def test_entropy_is_the_mean_over_targets(lines: list[str]) -> None:
    """By the definition: each target against the texts that have the same tokens before it."""
    texts = [[SOS, *(ord(word[0]) for word in line.split()), EOS] for line in lines]
    beginnings = Counter(tuple(text[:end]) for text in texts for end in range(1, len(text)))
    longer = Counter(tuple(text[: end + 1]) for text in texts for end in range(1, len(text)))
    surprises = [
        -log(longer[tuple(text[: end + 1])] / beginnings[tuple(text[:end])])
        for text in texts
        for end in range(1, len(text))
    ]
    assert entropy_per_target(texts) == pytest.approx(sum(surprises) / len(surprises))


def test_own_text_begins_with_love() -> None:
    lines = lines_of(OWN_TEXT, "own")
    assert len(lines) == 12
    assert lines.count("Love that can quickly seize the gentle heart") == 3
    assert sum(line.startswith("Love") for line in lines) == 3


@pytest.mark.parametrize("kind", ["word", "bpe"])
def test_tokenizer_gives_the_text_back(kind, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    lines = ["Love that can, quickly", "naïve 猫 heart"]
    build_tokenizer(lines, kind).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("")["input_ids"] == [SOS]
    assert tokenizer.convert_ids_to_tokens([PAD, SOS, EOS]) == list(SPECIAL_TOKENS)
    for line in lines:
        ids = tokenizer(line)["input_ids"]
        assert ids[0] == SOS
        assert tokenizer.decode([*ids, EOS, PAD], skip_special_tokens=True) == line


def test_bpe_knows_every_text() -> None:
    tokenizer = build_tokenizer(["Love that can"], "bpe")
    assert tokenizer.decode(tokenizer("zebra ☃")["input_ids"], skip_special_tokens=True) == "zebra ☃"


def test_every_word_of_a_large_text_has_a_token() -> None:
    """The library's own limit is 30,000 words; a word lost to it could not be encoded."""
    lines = [f"word{number}" for number in range(40_000)]
    assert len(build_tokenizer(lines, "word")) == 40_003


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "nothing but white space"),
        (b"Love \xff that", "not UTF-8 .byte 5 is 0xff"),
        (b"Love\nthat [EOS] can", "line 2 has .EOS. in it"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "a Git LFS pointer.*run `git lfs pull`"),
    ],
)
def test_bad_text_is_refused(tmp_path: Path, content: bytes, complaint: str) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    with pytest.raises(TextError, match=complaint):
        lines_of(read_text(file), str(file))


def test_byte_order_mark_and_windows_line_ends_are_no_text(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes("\ufeffLove that\r\n\r\ncan\r\n".encode())
    assert lines_of(read_text(file), "it") == ["Love that", "can"]
