"""Training: one static shape, the loss by the definition, and a killed training that ends as an undisturbed one."""

import multiprocessing
import signal
import time
from itertools import cycle
from multiprocessing.connection import Connection
from pathlib import Path

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

PROCESSES = multiprocessing.get_context("spawn")
"""Torch allows no backward pass in a fork once autograd has threads here: with a GPU, or after some other test."""


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


def train_and_report(folder: Path, step: Connection) -> None:
    """Send the number of every step that is done."""
    training.train(folder, lambda done, _: step.send(done))


@settings(max_examples=1, phases=[Phase.generate])
@given(last=st.integers(3, 20), later_s=st.floats(0, 0.02))
def test_killed_and_resumed_ends_bit_equal(
    undisturbed: Path, tmp_path_factory: pytest.TempPathFactory, last: int, later_s: float
) -> None:
    folder = tmp_path_factory.mktemp("training") / "killed"
    training_folder.begin(folder, OWN_TEXT, TINY)
    steps, step = PROCESSES.Pipe(duplex=False)
    child = PROCESSES.Process(target=train_and_report, args=(folder, step))
    child.start()
    step.close()  # the child has its own end: if it dies early, `recv` fails and does not wait
    while steps.recv() != last:
        pass
    time.sleep(later_s)  # anywhere within a step, or a checkpoint's writing
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL
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


def test_newest_complete_checkpoint_counts(tmp_path: Path) -> None:
    folder = training_folder.checkpoints(tmp_path)
    assert training_folder.newest_checkpoint(tmp_path) is None
    for step in (9, 10, 11):
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        (folder / f"checkpoint-{step}" / "model.safetensors").write_bytes(b"weights")
    for step in (9, 10):  # 11 was cut short by a kill
        training_folder.mark_complete(tmp_path, step)
    assert training_folder.newest_checkpoint(tmp_path) == folder / "checkpoint-10"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-10", "checkpoint-9"]


def test_kill_before_the_marker_loses_the_checkpoint_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed where the newest checkpoint has all its files, but not its marker: the one before it is taken."""
    mark = training_folder.mark_complete

    def killed_at_third(folder: Path, step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt
        mark(folder, step)

    training_folder.begin(tmp_path / "a", OWN_TEXT, TINY)
    with monkeypatch.context() as patch:
        patch.setattr(training_folder, "mark_complete", killed_at_third)
        with pytest.raises(KeyboardInterrupt):
            training.train(tmp_path / "a")
    kept = training_folder.checkpoints(tmp_path / "a")
    assert (kept / "checkpoint-3" / "trainer_state.json").is_file()
    newest = training_folder.newest_checkpoint(tmp_path / "a")
    assert newest == kept / "checkpoint-2"
    (newest / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(DamagedError, match="checkpoint-2 cannot be loaded"):
        training.train(tmp_path / "a")


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
