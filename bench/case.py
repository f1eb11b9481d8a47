"""Case: one cell of the grid, frozen and hashable, the key of everything. Sweep: a grid. Presets: lists of sweeps."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import msgspec

from kvcache.strategies.catalogue import PREFILLING_AS_STORED, REFEEDING

NaiveLogits = Literal["last", "all"]
DeviceName = Literal["cpu", "cuda"]
HOST: DeviceName = "cpu"
"""The device that every machine has."""
HOST_DEVICES = frozenset({HOST})
"""Devices on which the worker's own threads compute, in the machine's memory."""


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One strategy at one point of the grid. `n_depth` tokens lie in the cache, `n_prompt` are fed, `n_gen` emitted."""

    model: str
    strategy: str
    device: DeviceName
    dtype: str
    attn_implementation: str
    n_threads: int
    batch_size: int
    n_prompt: int
    n_gen: int
    n_depth: int
    seed: int
    naive_logits: NaiveLogits = "last"
    prefill_quantized: bool = False
    """The prompt attends to its own keys and values as they are stored, that is, rounded."""

    @property
    def group(self) -> Group:
        """Return what cases of the same weights and settings share; each strategy has one worker for them."""
        return msgspec.convert(self, Group, from_attributes=True)

    @property
    def cell(self) -> Case:
        """Leave the strategy of this case open: equal for the cases that are compared with each other."""
        return msgspec.structs.replace(self, strategy="", naive_logits="last", prefill_quantized=False)

    @property
    def text(self) -> Case:
        """Return what cases have in common that are judged over one text: all but their strategies and lengths."""
        return msgspec.structs.replace(self.cell, n_prompt=0, n_gen=0, n_depth=0)

    @property
    def on_host(self) -> bool:
        """Return whether the worker's own threads compute it: a call returns when its work is done."""
        return self.device in HOST_DEVICES

    @property
    def capacity(self) -> int:
        """Count the tokens that one sequence holds at the end: context, prompt and every emitted token."""
        return self.n_depth + self.n_prompt + self.n_gen

    @property
    def key(self) -> str:
        """Make a readable name, equal for equal cases and different for different ones."""
        parts = [self.model, self.strategy, self.device, self.dtype, self.attn_implementation, f"t{self.n_threads}"]
        parts += [f"b{self.batch_size}", f"p{self.n_prompt}", f"n{self.n_gen}", f"d{self.n_depth}", f"s{self.seed}"]
        if self.strategy in REFEEDING and self.naive_logits == "all":
            parts.append("all-logits")
        if self.prefill_quantized:
            parts.append("prefill-quantized")
        return " ".join(parts)


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """What the processes of a set of strategies have in common: the same weights under the same settings."""

    model: str
    device: DeviceName
    dtype: str
    attn_implementation: str
    n_threads: int


class Sweep(msgspec.Struct, frozen=True, kw_only=True):
    """Lists that span a grid; their product is the cases, in the order model, settings, cell, strategy."""

    models: tuple[str, ...] = ("smollm2-135m",)
    strategies: tuple[str, ...] = ("naive", "dynamic", "static", "compiled", "hf-generate")
    n_prompt: tuple[int, ...] = (32, 128, 512, 2048)
    n_gen: tuple[int, ...] = (16,)
    n_depth: tuple[int, ...] = (0,)
    batch_size: tuple[int, ...] = (1,)
    dtype: tuple[str, ...] = ("float32",)
    n_threads: tuple[int, ...] = ()
    device: DeviceName = HOST
    attn_implementation: str = ""
    """Empty: the plan takes sdpa where the model has it, and else eager."""
    naive_logits: NaiveLogits = "last"
    prefill_quantized: bool = False
    seed: int = 0

    def cases(self) -> list[Case]:
        """List every case of the grid."""
        lists: dict[str, tuple[Any, ...]] = {
            "model": self.models,
            "dtype": self.dtype,
            "n_threads": self.n_threads,
            "batch_size": self.batch_size,
            "n_depth": self.n_depth,
            "n_prompt": self.n_prompt,
            "n_gen": self.n_gen,
            "strategy": self.strategies,
        }
        cases = []
        for values in itertools.product(*lists.values()):
            fields = dict(zip(lists, values, strict=True), device=self.device, seed=self.seed)
            fields["attn_implementation"] = self.attn_implementation
            fields["naive_logits"] = self.naive_logits if fields["strategy"] in REFEEDING else "last"
            fields["prefill_quantized"] = self.prefill_quantized and fields["strategy"] in PREFILLING_AS_STORED
            cases.append(Case(**fields))
        return cases


PRESETS: dict[str, tuple[Sweep, ...]] = {
    # Without `compiled`, which needs a C++ compiler and compiles for many seconds: smoke runs anywhere, and at once.
    "smoke": (
        Sweep(
            models=("random:tiny",),
            strategies=("naive", "dynamic", "static", "hf-generate"),
            n_prompt=(16, 64),
            n_gen=(8,),
        ),
    ),
    "default": (Sweep(),),
    "full": (
        Sweep(dtype=("float32", "bfloat16")),
        Sweep(batch_size=(4,), n_prompt=(128, 512)),
        Sweep(n_depth=(512, 2048), n_prompt=(1, 128)),
    ),
    "engine": (
        Sweep(n_prompt=(128,), n_gen=(64,), batch_size=(1, 4)),
        Sweep(n_prompt=(128,), n_gen=(64,), dtype=("bfloat16",)),
        Sweep(models=("random:gpt2",), n_prompt=(128,), n_gen=(64,)),
    ),
    "caches": (  # one cell each depth: the sweeps differ in strategies alone
        Sweep(
            strategies=("dynamic", "static", "compiled", "compiled-int8", "compiled-int4"),
            n_prompt=(1,),
            n_gen=(8,),
            n_depth=(512, 2048),
        ),
        Sweep(
            # One of the two 4-bit kinds: the preset is to end within ten minutes.
            strategies=("quanto-int4", "hqq-int8", "fp8", "sink-window"),
            n_prompt=(1,),
            n_gen=(8,),
            n_depth=(512, 2048),
        ),
    ),
}
"""Lists of sweeps by name; `kvbench run` without arguments measures `default`."""


TOKENS_PER_TURN = 640
"""Tokens that a turn of naive decode feeds, roughly, unless a budget allows fewer."""


def naive_steps(case: Case, tokens_per_turn: int = TOKENS_PER_TURN) -> list[int]:
    """Choose the decode steps (1 to n_gen - 1) of a naive case that are timed: every k-th, from the middle of k on.

    A naive step depends on its length alone, so a long decode is timed at every k-th position and interpolated. k is
    the smallest that keeps the tokens fed in one turn (over the whole batch) near `tokens_per_turn`; it is computed
    from the case, not from a clock, so that every machine times the same steps. The steps lie in the middle of their
    stretches, since the midpoint rule is exact for a cost that grows linearly.

    >>> cases = Sweep(n_threads=(2,), n_prompt=(32, 512, 2048), strategies=("naive",)).cases()
    >>> [len(naive_steps(case)) for case in cases]
    [15, 1, 1]
    >>> naive_steps(cases[1])
    [8]
    """
    n_steps = case.n_gen - 1
    if n_steps == 0:
        return []
    tokens_per_step = case.batch_size * (case.n_depth + case.n_prompt + case.n_gen // 2)
    wanted = max(1, tokens_per_turn // tokens_per_step)
    k = -(-n_steps // wanted)
    return list(range((k + 1) // 2, n_steps + 1, k))
