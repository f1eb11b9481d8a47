"""`kvbench train` by the command line: the note's sentence comes out of what it trained, and bad input is refused."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from kvcache.learn import training_folder
from kvcache.learn.corpus import OWN_TEXT
from kvcache.learn.training_folder import Settings
from tests import inline
from tests.commandline import kvbench, refused
from tests.tiny import EVERYWHERE

FEW = ["--strategies", "naive,dynamic", "-n", "4", "-r", "1", "-t", "1", "--no-ceilings"]
SENTENCE = "Love that can quickly seize the gentle heart"


def test_text_is_learnt_by_heart(love: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(love, tmp_path / "love")  # it draws the loss again; other processes read `love` meanwhile
    outcome = json.loads(kvbench("train", "--resume", str(folder), "-o", "json").stdout)  # finished: reports the result
    assert outcome["excess"] == outcome["loss"] - outcome["entropy"]
    assert 0 < outcome["excess"] < 0.1
    assert (outcome["n_texts"], outcome["n_cut"], outcome["shape"]) == (12, 0, [12, 64])
    assert (folder / "loss.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "strategy",
    [pytest.param(name, marks=pytest.mark.compiled) if name == "compiled" else name for name in EVERYWHERE],
)
def test_sentence_comes_from_the_start_token_alone(love: Path, strategy: str) -> None:
    command = ["generate", "--model", str(love), "--prompt", "", "--strategy", strategy, "-t", "1"]
    assert kvbench(*command).stdout == f"{SENTENCE}\n"


def test_beginning_of_a_line_is_continued(love: Path) -> None:
    command = ["generate", "--model", str(love), "-t", "1", "--prompt", "No river"]
    assert kvbench(*command).stdout == "asks the sea how deep it is\n"
    assert "no token for zebra, lion" in refused(*command[:-1], "No zebra asks the lion")
    assert "64 positions" in refused(*command, "-n", "64")


def test_result_is_an_ordinary_checkpoint_folder(love: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bare command: of the preset's prompts it takes those that the model has positions for."""
    inline.use(monkeypatch)
    monkeypatch.setattr("bench.tell.report.write_plots", lambda report, derived: {})
    done = kvbench("run", "--model", str(love), *FEW, "--out", str(tmp_path))
    assert "has 64 positions: the preset's prompts of 128, 512, 2048 are left out" in done.stderr
    summary = pd.read_csv(Path(done.stdout.split()[-1]) / "summary.csv", dtype=str)
    assert set(summary["n_prompt"]) == {"32"}
    assert set(summary["tokens_match"]) == {"true"}


def test_own_text_is_cut_and_counted(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a b c d e f\na b\n\nc\n")
    flags = ["--text", str(text), "--steps", "3", "-t", "1", "-o", "json", "--context-length", "4"]
    for tokenizer, n_targets in {"word": 4 + 3 + 2, "bpe": 9}.items():  # BPE: as many, its white space in the words
        out = kvbench("train", *flags, "--out", str(tmp_path / tokenizer), "--tokenizer", tokenizer).stdout
        outcome = json.loads(out)
        assert (outcome["n_texts"], outcome["n_cut"], outcome["shape"]) == (3, 1, [3, 4])
        assert outcome["n_targets"] == n_targets


@pytest.mark.parametrize(
    ("content", "flags", "complaint"),
    [
        (b"", [], "is empty"),
        (b"  \n \n", [], "nothing but white space"),
        (b"\xff\xfe", [], "not UTF-8"),
        (b"a [PAD] b", [], "line 1 has [PAD]"),
        (b"a b", ["--context-length", "0"], "--context-length 0: give an integer from 2 to 4096"),
        (b"a b", ["--context-length", "1"], "--context-length 1: give an integer from 2 to 4096"),
        (b"a b", ["--context-length", "5000"], "--context-length 5000: give an integer from 2 to 4096"),
        (b"a b", ["--steps", "0"], "--steps 0: give an integer of at least 1"),
        (b"a b", ["--seed", "-1"], "--seed -1: give an integer from 0 to 4294967295"),
        (b"a b", ["--tokenizer", "words"], "did you mean word?"),
        (b"a b", ["--resume", "x"], "leave out every flag"),
    ],
)
def test_bad_input_is_refused_and_nothing_written(tmp_path: Path, content, flags, complaint) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_bytes(content)
    assert complaint in refused("train", "--text", str(text), "--out", str(out), *flags)
    assert not out.exists()


def test_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("kept")
    assert "is not empty" in refused("train", "--out", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    begun = tmp_path / "begun"
    training_folder.begin(begun, OWN_TEXT, Settings())
    assert "--resume" in refused("train", "--out", str(begun))
    assert "--out" in refused("train")
    assert "No such file" in refused("train", "--text", str(tmp_path / "none"), "--out", str(tmp_path / "x"))


def test_resume_needs_a_training(tmp_path: Path) -> None:
    assert "holds no training" in refused("train", "--resume", str(tmp_path), code=3)
