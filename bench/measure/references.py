"""What a case is checked against, in files: one worker makes them from the model, the others read them."""

from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from bench.case import Case
from bench.protocol import MakeText, TextMade
from bench.record import Quality
from kvcache.models.skeleton import max_positions
from kvcache.proof.judging import JudgedText, judge, predict, text_length
from kvcache.proof.quality import sample_text
from kvcache.proof.tokens import Reference, reference
from kvcache.strategies.catalogue import PLAIN_CACHE, build
from kvcache.strategies.strategy import Strategy


def token_ids(case: Case, vocab_size: int) -> tuple[Tensor | None, Tensor]:
    """Draw the seeded context `[batch, n_depth]` (None without depth) and prompt `[batch, n_prompt]` of a case.

    Equal for every strategy of a cell; the tokens are drawn uniformly, since a step's time does not depend on them.
    """
    generator = torch.Generator().manual_seed(case.seed)
    ids = torch.randint(vocab_size, (case.batch_size, case.n_depth + case.n_prompt), generator=generator)
    context, prompt = ids.split([case.n_depth, case.n_prompt], dim=1)
    return (context if case.n_depth else None), prompt


def ids_for(model: PreTrainedModel, case: Case) -> tuple[Tensor | None, Tensor]:
    """Draw `token_ids` for a model, on its device."""
    context, prompt = token_ids(case, model.config.get_text_config(decoder=True).vocab_size)
    return (context.to(model.device) if context is not None else None), prompt.to(model.device)


def make_reference(model: PreTrainedModel, case: Case, path: Path, room_bytes: int | None) -> None:
    """Store the tokens and logits that naive greedy re-feed gives for `case`; `room_bytes` is as in `reference`."""
    context, prompt = ids_for(model, case)
    found = reference(model, prompt, case.n_gen, context, room_bytes)
    facts = {
        "prefix_stable": torch.tensor(found.prefix_stable),
        "by_naive": torch.tensor(found.by_naive),
        "rounding": torch.tensor(found.rounding, dtype=torch.float64),
    }
    _store(vars(found) | facts, path)


def make_text(model: PreTrainedModel, request: MakeText, room_bytes: int | None) -> TextMade:
    """Store the text that judges the lossy strategies of a cell, and what the model predicts over it.

    `room_bytes` is the memory that may be taken beyond what judging cannot do without; None: as much as there is.
    """
    case, positions = request.case, max_positions(model)
    made, tokens = TextMade(), request.tokens
    if tokens is None:
        made = _written(model, request, text_length(request.n_context, positions))
        tokens = made.tokens
    n = text_length(case.n_depth + case.n_prompt, positions)
    text = torch.tensor(tokens, device=model.device)[:, :n]
    _store(vars(predict(model, text, room_bytes)), Path(request.path))
    return made


def _written(model: PreTrainedModel, request: MakeText, n: int) -> TextMade:
    start = torch.cat([ids for ids in ids_for(model, request.case) if ids is not None], dim=1)[:, :1]

    def made(writer: str) -> TextMade:
        return TextMade(writer=writer, tokens=sample_text(build(writer, model), start, n, request.case.seed).tolist())

    if request.writer != PLAIN_CACHE:
        with suppress(Exception):  # whatever it is; where the CUDA context is lost, the other fails, too
            return made(request.writer)
    return made(PLAIN_CACHE)


def read_reference(path: str, device: str) -> Reference:
    """Read what `make_reference` stored."""
    stored = load_file(path, device=device)
    return Reference(
        stored["tokens"],
        stored["logits"],
        prefix_stable=bool(stored["prefix_stable"]),
        by_naive=bool(stored["by_naive"]),
        rounding=float(stored["rounding"]),
    )


def judge_by_text(strategy: Strategy, path: str, device: str) -> Quality | None:
    """Compare with the exact predictions over the text at `path`; leaves `matching_tokens` open.

    None where these predictions depend on later tokens, so that they are no measure of what a cache loses.
    """
    text = JudgedText(**load_file(path, device=device))
    if not text.prefix_stable:
        return None
    found, recall = judge(strategy, text)
    return Quality(
        positions=len(found.agreement_by_position),
        logit_kl_floor=text.floor.item() if len(text.floor) else None,
        matching_tokens=0,
        recall_agreement=recall,
        **vars(found),
    )


def _store(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except (OSError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        raise OSError(f"{path}: {reason}; set TMPDIR to a folder with room") from error
