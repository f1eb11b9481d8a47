"""Training: one static shape, the loss by the definition, and a killed training that ends as an undisturbed one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from itertools import cycle
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from kvcache.learn import training, training_folder
from kvcache.learn.corpus import IGNORED, OWN_TEXT, build_corpus, build_tokenizer, lines_of
from kvcache.learn.training_folder import DamagedError, FolderError, Settings

TINY = Settings(context_length=12, steps=24, batch_size=5, n_layer=1, n_head=2, n_embd=16)
"""Fewer texts in a step than there are, so that the order of the texts must be resumed as well."""

BEGUN = """
import sys
from pathlib import Path
from kvcache.learn.training import train
train(Path(sys.argv[1]), lambda step, loss: print(step, flush=True))
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training") / "undisturbed"
    training_folder.begin(folder, OWN_TEXT, TINY)
    training.train(folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_loss_is_the_mean_over_the_targets_that_count() -> None:
    logits = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[3, 1, IGNORED, IGNORED], [2, 5, 0, IGNORED]])
    surprises = [
        -logits[row, place].log_softmax(-1)[target]
        for row, line in enumerate(targets.tolist())
        for place, target in enumerate(line)
        if target != IGNORED
    ]
    assert torch.allclose(training.next_token_loss(logits, targets), torch.stack(surprises).mean())


def test_every_batch_has_one_shape(undisturbed: Path) -> None:
    outcome = training_folder.read(undisturbed)[0].outcome
    assert outcome is not None
    assert outcome.shape == (5, 12)
    assert [step for step, _ in outcome.losses] == list(range(1, 25))
    assert outcome.losses[-1][1] < outcome.losses[0][1]


def test_a_second_shape_would_be_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = cycle([12, 7])

    def ragged(rows):
        keep = next(lengths)
        return {name: torch.stack([row[name][:keep] for row in rows]) for name in rows[0]}

    monkeypatch.setattr(training, "default_data_collator", ragged)
    training_folder.begin(tmp_path / "new", OWN_TEXT, TINY)
    with pytest.raises(AssertionError, match="one static shape"):
        training.train(tmp_path / "new")


def test_a_compiler_compiles_once() -> None:
    """One shape is what spares a compiler from compiling again: however long the texts, there is one graph."""
    lines = lines_of(OWN_TEXT, "own")
    tokenizer = build_tokenizer(lines, "word")
    corpus = build_corpus(lines, tokenizer, TINY.context_length)
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(training.build_model(TINY, tokenizer), backend=backend)
    for first in range(0, 10, 5):
        batch = corpus[slice(first, first + 5)]
        training.next_token_loss(compiled(batch["input_ids"]).logits, batch["labels"])
    once = len(graphs)
    assert once >= 1
    compiled(corpus.input_ids[5:10, :7])
    assert len(graphs) > once


@settings(max_examples=1, phases=[Phase.generate])
@given(last=st.integers(3, 20), later_s=st.floats(0, 0.02))
def test_killed_and_resumed_ends_bit_equal(
    undisturbed: Path, tmp_path_factory: pytest.TempPathFactory, last: int, later_s: float
) -> None:
    folder = tmp_path_factory.mktemp("training") / "killed"
    training_folder.begin(folder, OWN_TEXT, TINY)
    tree = str(Path(__file__).resolve().parents[2])
    child = subprocess.Popen(
        [sys.executable, "-c", BEGUN, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tree,
        env=os.environ | {"PYTHONPATH": tree},
    )
    assert child.stdout is not None
    for line in child.stdout:
        if int(line) == last:
            break
    time.sleep(later_s)  # anywhere within a step, or a checkpoint's writing
    child.send_signal(signal.SIGKILL)
    child.wait()
    record, _ = training_folder.read(folder)
    assert record.outcome is None
    assert not (folder / "model.safetensors").exists()

    seen: list[int] = []
    resumed = training.train(folder, lambda step, _: seen.append(step))
    assert 2 < seen[0] <= TINY.steps  # not from the beginning
    assert resumed == training_folder.read(undisturbed)[0].outcome  # every loss on the way, and the last
    expected = weights(undisturbed)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(folder).items())


def test_finished_training_is_not_done_again(undisturbed: Path) -> None:
    before = weights(undisturbed)
    seen: list[int] = []
    outcome = training.train(undisturbed, lambda step, _: seen.append(step))
    assert seen == []
    assert outcome == training_folder.read(undisturbed)[0].outcome
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(undisturbed).items())


def test_no_pickled_arguments_are_left(undisturbed: Path) -> None:
    assert list(undisturbed.rglob("checkpoint-*"))
    assert not list(undisturbed.rglob("training_args.bin"))


def begun(folder: Path, step: int, settings: Settings = TINY) -> Path:
    """A training with one sealed checkpoint of made-up files."""
    if not folder.exists():
        training_folder.begin(folder, OWN_TEXT, settings)
    checkpoint = training_folder.checkpoints(folder) / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    training_folder.seal(folder, step)
    return checkpoint


def test_newest_sealed_checkpoint_counts(tmp_path: Path) -> None:
    begun(tmp_path / "a", 9)
    newest = begun(tmp_path / "a", 10)
    (newest.parent / "checkpoint-11").mkdir()  # cut short by a kill
    assert training_folder.newest_checkpoint(tmp_path / "a") == newest


@pytest.mark.parametrize("change", ["altered", "added", "removed", "another training's", "broken seal"])
def test_checkpoint_that_this_training_did_not_write_is_refused(tmp_path: Path, change: str) -> None:
    checkpoint = begun(tmp_path / "a", 10)
    if change == "altered":
        (checkpoint / "model.safetensors").write_bytes(b"Weights")
    elif change == "added":
        (checkpoint / "pytorch_model.bin").write_bytes(b"pickle")
    elif change == "removed":
        (checkpoint / "model.safetensors").unlink()
    elif change == "another training's":
        other = begun(tmp_path / "b", 11, msgspec.structs.replace(TINY, seed=1))
        other.rename(checkpoint.parent / other.name)
    else:
        (checkpoint / "kvbench-seal.json").write_text("{")
    with pytest.raises(DamagedError, match="not as this training wrote it"):
        training_folder.newest_checkpoint(tmp_path / "a")


def test_changed_text_or_record_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    training_folder.begin(folder, OWN_TEXT, TINY)
    (folder / "text.txt").write_text(OWN_TEXT + "more")
    with pytest.raises(DamagedError, match="not the text"):
        training_folder.read(folder)
    (folder / "training.json").write_text('{"settings": 3}')
    with pytest.raises(DamagedError, match="damaged"):
        training_folder.read(folder)
    with pytest.raises(DamagedError, match="no training"):
        training_folder.read(tmp_path)


def test_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(FolderError, match="not empty"):
        training_folder.begin(tmp_path, OWN_TEXT, TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(FolderError, match="is a file"):
        training_folder.begin(tmp_path / "mine", OWN_TEXT, TINY)
    assert (tmp_path / "mine").read_text() == "kept"
