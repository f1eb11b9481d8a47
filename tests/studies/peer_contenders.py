"""Who takes part in `peers`: kvbench's strategies and the other engines, each loaded and its tokens checked."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import torch

from bench.case import Case
from bench.measure.server_process import RunServers, worker_environment
from bench.protocol import CheckCase, Checked, Judge, Load, MakeText, TakeTurn, TurnTaken
from kvcache.strategies.catalogue import is_lossy
from kvcache.strategies.tolerance import TOLERANCE
from tests.studies import peer_protocol
from tests.studies.overhead import Times
from tests.studies.peer_process import TIMEOUT_S, Peer, PeerFailed
from tests.studies.peer_protocol import Generate, Generated, Loaded
from tests.studies.peer_table import Findings, parting
from tests.studies.peer_weights import converted

OTHERS: dict[str, tuple[str, str | None]] = {
    "ctranslate2": ("ctranslate2", None),
    "llama.cpp": ("llama.cpp", None),
    "onnxruntime-genai": ("onnxruntime-genai", None),
    "openvino": ("openvino", None),
    "openvino-default": ("openvino", ""),
    "llama.cpp-q8_0": ("llama.cpp", "q8_0"),
    "llama.cpp-q4_0": ("llama.cpp", "q4_0"),
    "openvino-u8": ("openvino", "u8"),
}
"""Name in the table -> engine, and how it keeps the cache; None: in the data type. OpenVINO's default chooses the data
type too, by the processor."""


@dataclass
class Competitor:
    """What takes turns, and what is known of it."""

    name: str
    kv: str
    turn: Callable[[], Times]
    tokens: str
    cpu_ns: Callable[[], int]
    """CPU time that its process has used so far."""
    times: list[Times] = field(default_factory=list)
    idle_ns: int = 0
    """CPU time that its process took in the turns of others: it should sleep."""


@dataclass
class Cell:
    """One case with what is expected of every engine."""

    case: Case
    reference: Path
    context: list[int]
    prompt: list[int]
    expected: list[int]
    logits: np.ndarray
    """Naive re-feed's, `[n_gen, vocab]`."""


def strategy(name: str, cell: Cell, servers: RunServers, stack: ExitStack) -> Competitor:
    """Check a strategy of kvbench, in a worker of its own."""
    case = msgspec.structs.replace(cell.case, strategy=name)
    arm = stack.enter_context(servers.fork(case.model, case.n_threads))
    arm.ask(Load(group=case.group, strategy=name, naive_logits="last", seed=case.seed), TIMEOUT_S)
    if is_lossy(name):  # judged over the shortest text there is: only its equal tokens are wanted
        text = str(cell.reference.with_name("text.safetensors"))
        arm.ask(MakeText(case=case, path=text, tokens=[cell.prompt[:1] * 3]), TIMEOUT_S)
        judge = Judge(case=case, path=str(cell.reference), text=text, n_threads=case.n_threads)
        arm.ask(judge, TIMEOUT_S)
    checked = arm.ask(CheckCase(case=case, path=str(cell.reference)), TIMEOUT_S)
    assert isinstance(checked, Checked)
    tokens = {"true": "same", "tie": "a tie", "false": "others"}[checked.tokens_match]
    if checked.tokens_match == "false":
        if checked.quality is None:
            raise PeerFailed(f"its logits differ by {checked.logits_error:.1e} of the largest")
        tokens = f"{checked.quality.matching_tokens} of {case.n_gen} same, then others"

    def turn() -> Times:
        taken = arm.ask(TakeTurn(), TIMEOUT_S)
        assert isinstance(taken, TurnTaken)
        return taken.prefill_ns / 1e6, statistics.fmean(taken.step_ns) / 1e6

    return Competitor(name, name.partition("-")[2] if is_lossy(name) else case.dtype, turn, tokens, lambda: arm.cpu_ns)


def peer(name: str, cell: Cell, stack: ExitStack, findings: Findings) -> Competitor:
    """Check another engine, in a process of its own, by its tokens."""
    case, (engine, kv) = cell.case, OTHERS[name]
    weights = converted(engine, case.model, case.dtype)
    worker = stack.enter_context(Peer(engine, worker_environment(case.n_threads)))
    load = peer_protocol.Load(
        engine=engine,
        weights=str(weights),
        dtype=case.dtype,
        kv=case.dtype if kv is None else kv,
        n_threads=case.n_threads,
        capacity=case.capacity,
        absent=next(token for token in range(len(cell.expected) + 1) if token not in cell.expected),
    )
    loaded = worker.ask(load)
    assert isinstance(loaded, Loaded)
    findings.versions[engine] = loaded.description
    request = Generate(context=cell.context, prompt=cell.prompt, n_gen=case.n_gen)

    def generate(request: Generate) -> Generated:
        generated = worker.ask(request)
        assert isinstance(generated, Generated)
        return generated

    first = generate(msgspec.structs.replace(request, logits=True))
    tokens = parting(first.tokens, cell.expected, cell.logits, TOLERANCE[getattr(torch, case.dtype)])
    if tokens != "same":
        off = "" if first.logits is None else f"; {logits_error(first.logits, cell)}"
        if loaded.kv == case.dtype and "a tie" not in tokens:
            raise PeerFailed(f"it emits other tokens: {tokens}{off}")
        tokens = f"{tokens} ({findings.note(f'{name}, {case.dtype}: {tokens}{off}')})"

    def turn() -> Times:
        taken = generate(request)
        if taken.tokens != first.tokens:
            raise PeerFailed("it emitted other tokens in a timed turn than when it was checked")
        return taken.ns[0] / 1e6, statistics.fmean(taken.ns[1:]) / 1e6

    return Competitor(name, loaded.kv, turn, tokens, worker.cpu_ns)


def logits_error(logits: list[float], cell: Cell) -> str:
    """Say how far an engine's first logits are from naive re-feed's."""
    off = np.abs(np.array(logits) - cell.logits[0]).max() / np.abs(cell.logits).max()
    return f"its first logits differ by {off:.1e} of the largest"
