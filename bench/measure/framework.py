"""What a decode step costs before any arithmetic: Python, transformers, and torch's dispatch of its kernels."""

import torch

from bench.case import Case
from bench.machine.clock import Clock, stamping
from kvcache.caches.contract import UnfitCache, Unsupported
from kvcache.models import ModelError
from kvcache.models.shrunken import VOCAB_SIZE, shrunken
from kvcache.strategies.catalogue import build
from kvcache.strategies.strategy import Strategy

N_PROMPT = 8
"""Short: what attention to many tokens costs is no framework's."""
N_STEPS = 8
N_PASSES = 5
"""Each step counts with its fastest of so many passes: timed in one go, a single pass may fall into a slow moment of
the machine (seen: 7.9 ms of a step that takes 3.9 ms in the rounds), and no step runs faster than its framework."""


def time_steps(strategy: Strategy, case: Case, clock: Clock) -> list[int] | None:
    """Time decode steps of `strategy` on its model shrunk to next to no arithmetic, at the batch of `case`, in ns.

    None on CUDA, where Python runs ahead of the kernels and no sum is made of the two; for a strategy without a cache,
    which feeds a step other rows; for a compiled one, which would have to be compiled anew; and for a model that
    cannot be shrunk, or has no such cache then.
    """
    if not case.on_host or not strategy.reads_cache or strategy.compile_s is not None:
        return None
    small = shrunken(strategy.model)
    if small is None:
        return None
    own = build(case.strategy, small)
    try:
        own.prepare(case.batch_size, N_PROMPT + N_STEPS, prompt_length=N_PROMPT)
    except (Unsupported, UnfitCache, ModelError):
        return None
    prompt = torch.arange(case.batch_size * N_PROMPT).remainder(VOCAB_SIZE).view(case.batch_size, N_PROMPT)
    own.generate(prompt, N_STEPS + 1)
    passes: list[list[int]] = []
    for _ in range(N_PASSES):
        own.reset()
        clock.start()
        own.generate(prompt, N_STEPS + 1, stamping(clock))
        passes.append(clock.stop().host_ns[1:])
    return [min(times) for times in zip(*passes, strict=True)]
