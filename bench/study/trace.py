"""`kvbench trace`: traces each strategy on one prompt, times the steps, and turns token ids into text."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Literal

from torch import Tensor

from bench.errors import UsageError, blaming
from bench.machine.clock import Clock, stamping
from bench.machine.devices import DEVICES
from bench.naming import plural
from bench.study.prompt import Setting, get_ready, refusing
from kvcache.learn.trace import Step, trace
from kvcache.proof.tokens import NotRepeatable, agreement, reference
from kvcache.strategies.catalogue import build
from kvcache.strategies.strategy import Strategy

DEFAULT_N_GEN = 16

FEWEST_ROUNDS, MOST_ROUNDS = 3, 25
BUDGET_NS = 2_000_000_000
"""Time after which no round is added: other work on the machine hides a few milliseconds in a short trace."""


TokensMatch = Literal["true", "lossy", "tie", "false"]
"""Whether all strategies chose the same tokens; "lossy": all exact ones did; "tie": exact ones differ within the
rounding of the dtype; "false": beyond it."""


@dataclass(frozen=True, kw_only=True)
class ShownStep:
    """A step with the text of its tokens and its time."""

    step: Step
    fed: str
    """Text that the model was given."""
    out: str
    """Text of the token that came out."""
    ms: float


@dataclass(frozen=True, kw_only=True)
class Trace:
    """The steps of several strategies on one prompt, side by side."""

    model: str
    setting: str
    prompt: str
    tokens: tuple[str, ...]
    """Texts of the tokens of prompt and continuation, as the first strategy emitted them."""
    n_prompt: int
    steps: dict[str, list[ShownStep]]
    tokens_match: TokensMatch


def run(setting: Setting, prompt: str, *, strategies: tuple[str, ...], n_gen: int | None, until: int | None) -> Trace:
    """Trace each of `strategies` on `prompt`, up to `until`, the end of the text, or `n_gen` tokens.

    Raises:
        UsageError: as `get_ready` or `refusing`.
    """
    network, tokenizer, ids, room, stops = get_ready(setting, prompt, n_gen=n_gen, stop=until, stop_flag="--until")
    limit = min(DEFAULT_N_GEN, room) if n_gen is None and until is None else room
    built: dict[str, Strategy] = {}
    traced: dict[str, list[Step]] = {}
    for name in strategies:
        with refusing("--strategies", name, setting.model):
            strategy = built[name] = build(name, network)
            strategy.prepare(batch_size=1, capacity=ids.shape[1] + limit, prompt_length=ids.shape[1])
            traced[name] = trace(strategy, ids, limit, stops)
    chosen = {name: tuple(step.out for step in steps) for name, steps in traced.items()}
    exact = [name for name, strategy in built.items() if strategy.promise == "exact"]
    match: TokensMatch = "true" if len(set(chosen.values())) == 1 else "lossy"
    if len({chosen[name] for name in exact}) > 1:
        match = "tie"
        try:
            expected = reference(network, ids, limit)
        except NotRepeatable as error:
            raise UsageError(blaming("--model", setting.model, error)) from error
        for name in exact:
            built[name].reset()
            if agreement(built[name], ids, expected).tokens_match == "false":
                match = "false"
    times = step_times_ns(
        built, {name: len(steps) for name, steps in traced.items()}, ids, DEVICES[setting.device].clock()
    )

    def words(token_ids: tuple[int, ...]) -> str:
        return str(tokenizer.decode(list(token_ids))).replace("\n", "\\n")

    emitted = [step.out for step in next(iter(traced.values()))]
    return Trace(
        model=setting.model,
        setting=f"{setting.model}, {setting.dtype}, {setting.device}, {plural(setting.n_threads, 'thread')}",
        prompt=prompt,
        tokens=tuple(words((token,)) for token in (*ids[0].tolist(), *emitted)),
        n_prompt=ids.shape[1],
        steps={
            name: [
                ShownStep(step=step, fed=words(step.fed), out=words((step.out,)), ms=time_ns / 1e6)
                for step, time_ns in zip(steps, times[name], strict=True)
            ]
            for name, steps in traced.items()
        },
        tokens_match=match,
    )


def step_times_ns(
    strategies: Mapping[str, Strategy], n_steps: Mapping[str, int], prompt: Tensor, clock: Clock
) -> dict[str, list[float]]:
    """Return for each strategy the median time in ns of each of its steps; the first step is the prefill.

    A trace shows where the time goes; it is not a benchmark, since all strategies share one process and no interval is
    computed. They are warm (the trace itself was their warm-up) and take turns, so that a drift affects all of them.
    Each is prepared for `prompt` `[1, n_prompt]`; `clock` is the device's.
    """
    rounds_ns: dict[str, list[list[int]]] = {name: [] for name in strategies}
    n_rounds = spent_ns = 0
    while n_rounds < FEWEST_ROUNDS or (n_rounds < MOST_ROUNDS and spent_ns < BUDGET_NS):
        n_rounds += 1
        for name, strategy in strategies.items():
            strategy.reset()
            clock.start()
            strategy.generate(prompt, n_steps[name], stamping(clock))
            times = clock.stop()
            rounds_ns[name].append(times.event_ns or times.host_ns)
            spent_ns += sum(times.host_ns)
    return {name: [median(step) for step in zip(*rows, strict=True)] for name, rows in rounds_ns.items()}
