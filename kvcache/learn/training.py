"""Trains a small GPT-2 as in the study note: all positions at once under the causal mask, each on its next token.

transformers' Trainer runs the steps; the note's own part is corpus.py and `next_token_loss`.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from kvcache.learn import training_folder
from kvcache.learn.corpus import IGNORED, Corpus, build_corpus, build_tokenizer, lines_of, special_ids
from kvcache.learn.training_folder import DamagedError, OnLog, Outcome, Settings
from kvcache.models.skeleton import count_parameters, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

N_LOGS = 200
"""Approximate number of points of the loss curve; a tenth as many checkpoints are written."""


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats of `logits [batch, q, vocab]` against `targets [batch, q]`.

    IGNORED targets do not count. The targets are shifted already, so position t is compared with target t.
    """
    return cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)


def build_model(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """Build an untrained GPT-2 with as many positions as the context; equal seeds give equal weights.

    It has no dropout, since it should learn the text by heart and reach its entropy.
    """
    sos, eos, pad = special_ids(tokenizer)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=settings.context_length,
        n_layer=settings.n_layer,
        n_head=settings.n_head,
        n_embd=settings.n_embd,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=sos,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    set_seed(settings.seed)
    return GPT2LMHeadModel(config)


def train(folder: Path, on_log: OnLog | None = None) -> Outcome:
    """Train in `folder`, prepared by `training_folder.begin`, from its newest checkpoint if it has one.

    A training that was killed and resumed ends with the same weights as an undisturbed one, bit by bit, on the CPU
    with the same number of threads and the same versions. The result is an ordinary checkpoint folder, as
    `save_pretrained` writes it.

    Raises:
        DamagedError: the record, the text or the newest checkpoint cannot be read.
    """
    record, text = training_folder.read(folder)
    if record.outcome is not None:
        return record.outcome
    settings = record.settings
    torch.set_num_threads(settings.n_threads)
    lines = lines_of(text, str(folder))
    tokenizer = build_tokenizer(lines, settings.tokenizer)
    corpus = build_corpus(lines, tokenizer, settings.context_length)
    model = build_model(settings, tokenizer)
    checkpoint = training_folder.newest_checkpoint(folder)
    with quiet():
        trainer = _trainer(folder, model, corpus, settings, on_log)
        shapes = _watch_shapes(model)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except Exception as error:
            if checkpoint is None or shapes:  # not in loading: the model was fed
                raise
            reason = str(error).split("\n")[0]
            raise DamagedError(
                f"{checkpoint} cannot be loaded ({reason}); remove it to resume from an earlier"
            ) from error
    shape = (min(settings.batch_size, len(corpus)), settings.context_length)
    if shapes - {shape}:
        raise AssertionError(f"training must use one static shape, {shape}; it used {sorted(shapes)}")
    outcome = Outcome(
        loss=mean_loss(model, corpus, settings.batch_size),
        entropy=corpus.entropy,
        n_texts=len(corpus),
        n_cut=corpus.n_cut,
        n_targets=corpus.n_targets,
        n_parameters=count_parameters(model),
        shape=shape,
        losses=tuple((int(entry["step"]), entry["loss"]) for entry in trainer.state.log_history if "loss" in entry),
    )
    _save(folder, model, tokenizer)
    training_folder.write_record(folder, msgspec.structs.replace(record, outcome=outcome))
    return outcome


@torch.inference_mode()
def mean_loss(model: PreTrainedModel, corpus: Corpus, batch_size: int) -> float:
    """Return the mean loss of `model`, in nats, over all targets of `corpus`."""
    model.eval()
    total = 0.0
    for first in range(0, len(corpus), batch_size):
        batch = corpus[slice(first, first + batch_size)]
        targets = batch.pop("labels")
        total += next_token_loss(model(**batch).logits, targets).item() * int((targets != IGNORED).sum())
    return total / corpus.n_targets


def _trainer(folder: Path, model: PreTrainedModel, corpus: Corpus, settings: Settings, on_log: OnLog | None) -> Trainer:
    logging_steps = max(1, settings.steps // N_LOGS)
    arguments = TrainingArguments(
        output_dir=str(training_folder.checkpoints(folder)),
        max_steps=settings.steps,
        per_device_train_batch_size=min(settings.batch_size, len(corpus)),
        dataloader_drop_last=True,  # an incomplete batch would be a second shape; texts are shuffled every epoch
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(10, settings.steps // 10),
        seed=settings.seed,
        logging_steps=logging_steps,
        logging_nan_inf_filter=False,
        save_steps=logging_steps * max(1, settings.steps // logging_steps // (N_LOGS // 10)),
        save_total_limit=2,  # until the newest is marked complete, the one before it counts
        use_cpu=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=corpus,
        data_collator=default_data_collator,
        compute_loss_func=lambda outputs, labels, **_: next_token_loss(outputs.logits, labels),
        callbacks=[_Watch(folder, on_log)],
    )
    trainer.remove_callback(PrinterCallback)  # prints to stdout
    return trainer


class _Watch(TrainerCallback):
    """Marks every checkpoint once it is complete, and passes the losses on."""

    def __init__(self, folder: Path, on_log: OnLog | None) -> None:
        self.folder, self.report = folder, on_log

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        training_folder.mark_complete(self.folder, state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if self.report is not None and logs is not None and "loss" in logs:
            self.report(state.global_step, logs["loss"])


def _watch_shapes(model: PreTrainedModel) -> set[tuple[int, ...]]:
    """Return a set that fills with the shapes of all inputs that `model` is fed from now on."""
    shapes: set[tuple[int, ...]] = set()
    model.register_forward_pre_hook(lambda _, __, fed: shapes.add(tuple(fed["input_ids"].shape)), with_kwargs=True)
    return shapes


def _save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the result into a temporary folder and move it, the weights last: they make `folder` a model."""
    for left in folder.glob(".unfinished-*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as beside, quiet():
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        for path in sorted(Path(beside).iterdir(), key=lambda path: path.name == "model.safetensors"):
            path.replace(folder / path.name)
