"""`kvbench train` by the command line: the note's sentence comes out of what it trained, and bad input is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from bench.cli import main
from kvcache.learn import training_folder
from kvcache.learn.corpus import OWN_TEXT
from kvcache.learn.training_folder import Settings
from tests.commands.test_cli import refused
from tests.tiny import EVERYWHERE

FEW = ["--strategies", "naive,dynamic", "-n", "4", "-r", "1", "-t", "1", "--no-ceilings"]
SENTENCE = "Love that can quickly seize the gentle heart"


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """Run the command in this process; its stdout."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    captured = capsys.readouterr()
    assert ended.value.code == code, captured.err
    return captured.out


def test_text_is_learnt_by_heart(love: Path, tmp_path: Path, capsys) -> None:
    folder = shutil.copytree(love, tmp_path / "love")  # it draws the loss again; other processes read `love` meanwhile
    outcome = json.loads(run(capsys, "train", "--resume", str(folder), "-o", "json"))  # finished: reports the result
    assert outcome["excess"] == outcome["loss"] - outcome["entropy"]
    assert 0 < outcome["excess"] < 0.1
    assert (outcome["n_texts"], outcome["n_cut"], outcome["shape"]) == (12, 0, [12, 64])
    assert (folder / "loss.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "strategy",
    [pytest.param(name, marks=pytest.mark.compiled) if name == "compiled" else name for name in EVERYWHERE],
)
def test_sentence_comes_from_the_start_token_alone(love: Path, strategy: str, capsys) -> None:
    command = ["generate", "--model", str(love), "--prompt", "", "--strategy", strategy, "-t", "1"]
    assert run(capsys, *command) == f"{SENTENCE}\n"


def test_beginning_of_a_line_is_continued(love: Path, capsys) -> None:
    command = ["generate", "--model", str(love), "-t", "1", "--prompt", "No river"]
    assert run(capsys, *command) == "asks the sea how deep it is\n"
    assert "no token for zebra, lion" in refused(capsys, *command[:-1], "No zebra asks the lion")
    assert "64 positions" in refused(capsys, *command, "-n", "64")


def test_result_is_an_ordinary_checkpoint_folder(love: Path, tmp_path: Path, capsys) -> None:
    """The bare command: of the preset's prompts it takes those that the model has positions for."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["run", "--model", str(love), *FEW, "--out", str(tmp_path)])
    done = capsys.readouterr()
    assert ended.value.code == 0, done.err
    assert "has 64 positions: the preset's prompts of 128, 512, 2048 are left out" in done.err
    summary = pd.read_csv(Path(done.out.split()[-1]) / "summary.csv", dtype=str)
    assert set(summary["n_prompt"]) == {"32"}
    assert set(summary["tokens_match"]) == {"true"}


def test_own_text_is_cut_and_counted(tmp_path: Path, capsys) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a b c d e f\na b\n\nc\n")
    flags = ["--text", str(text), "--steps", "3", "-t", "1", "-o", "json", "--context-length", "4"]
    for tokenizer, n_targets in {"word": 4 + 3 + 2, "bpe": 9}.items():  # BPE: as many, its white space in the words
        out = run(capsys, "train", *flags, "--out", str(tmp_path / tokenizer), "--tokenizer", tokenizer)
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
        (b"a b", ["--context-length", "0"], "--context-length 0: give 2"),
        (b"a b", ["--context-length", "1"], "--context-length 1: give 2"),
        (b"a b", ["--context-length", "5000"], "--context-length 5000: give 2 to 4096"),
        (b"a b", ["--steps", "0"], "--steps 0: too small"),
        (b"a b", ["--seed", "-1"], "--seed -1"),
        (b"a b", ["--tokenizer", "words"], "did you mean word?"),
        (b"a b", ["--resume", "x"], "leave out every flag"),
    ],
)
def test_bad_input_is_refused_and_nothing_written(tmp_path: Path, capsys, content, flags, complaint) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_bytes(content)
    assert complaint in refused(capsys, "train", "--text", str(text), "--out", str(out), *flags)
    assert not out.exists()


def test_folder_with_something_in_it_is_refused(tmp_path: Path, capsys) -> None:
    (tmp_path / "thesis.txt").write_text("kept")
    assert "is not empty" in refused(capsys, "train", "--out", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    begun = tmp_path / "begun"
    training_folder.begin(begun, OWN_TEXT, Settings())
    assert "--resume" in refused(capsys, "train", "--out", str(begun))
    assert "--out" in refused(capsys, "train")
    assert "No such file" in refused(capsys, "train", "--text", str(tmp_path / "none"), "--out", str(tmp_path / "x"))


def test_resume_needs_a_training(tmp_path: Path, capsys) -> None:
    assert "holds no training" in refused(capsys, "train", "--resume", str(tmp_path), code=3)
