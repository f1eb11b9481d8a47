"""A worker: one process that holds one strategy on one model. It takes a turn on request and sleeps otherwise.

Forked by fork_server.py; reads requests and answers them, a line each (protocol.py). It ends when the requests do, and
dies with its parent.
"""

import gc
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO, Literal

import msgspec
import numpy as np
import torch
from torch import Tensor

from bench import protocol
from bench.case import Case, naive_steps
from bench.machine.ceilings import Ceilings
from bench.machine.clock import PausingClock, Times, stamping
from bench.machine.covariates import CovariateReader
from bench.machine.devices import DEVICES
from bench.manifest import CeilingName
from bench.measure import framework
from bench.measure.memory import Weight, weigh
from bench.measure.references import ids_for, judge_by_text, make_reference, make_text, read_reference
from bench.record import Quality
from kvcache import models
from kvcache.caches.contract import CacheNotRead, UnfitCache, Unsupported
from kvcache.models.own_code import users_line
from kvcache.models.skeleton import is_out_of_memory
from kvcache.proof.counts import PhaseCounter
from kvcache.proof.quality import equal_tokens
from kvcache.proof.tokens import NotRepeatable, Reference, agreement
from kvcache.strategies.catalogue import OWN, build, is_lossy
from kvcache.strategies.failing_forward import ForwardFails
from kvcache.strategies.strategy import Strategy

IN_OUR_WORDS = UnfitCache, models.ModelError
"""Errors of ours about what the user brought: their sentence needs no name of a class before it."""


class OtherTokens(Exception):
    """A timed turn emitted other tokens than the ones that were checked."""


class Worker:
    """Carries out requests, one at a time; between them it holds a model, a strategy and the case checked last."""

    judged: tuple[Case, Quality | None] | None = None
    """What was found of the case that is checked next; no quality where its text cannot judge."""
    compiled_s = 0.0
    """Seconds of compiling that were reported."""
    is_warm = False
    """Whether the strategy has run: the first pass of a process is heavier (`bench.measure.memory`)."""
    runs_users_code = False
    """Whether the model or the cache is the user's own, so that an error names its line."""
    ceilings_of: tuple[str, str, int] | None = None
    """The device, dtype and number of threads of `ceilings`."""

    strategy: Strategy
    case: Case
    tokens_per_turn: int
    prompt: Tensor
    expected: Reference
    ceilings: Ceilings

    def __init__(self, pause: Callable[[], None] | None = None) -> None:
        """`pause` returns when the driver wants the next token of a turn in lockstep; without it there is none."""
        self.pause = pause

    def answer(self, request: protocol.Request) -> protocol.Reply:
        """Carry out `request`; what goes wrong inside a model is answered, not raised."""
        try:
            return self._carry_out(request)
        except Unsupported as reason:
            of_model = isinstance(reason, ForwardFails) and isinstance(request, protocol.MakeReference)
            return protocol.Refused(status="unsupported", error=str(reason), of_model=of_model)
        except NotRepeatable as reason:
            return protocol.Refused(status="unsupported", error=str(reason), of_model=True)
        except OtherTokens as reason:
            return protocol.Refused(status="failed", error=str(reason), tokens_match="false")
        except Exception as error:  # noqa: BLE001  # whatever a model raises is this case's result, and the other cases go on
            lost = isinstance(error, torch.AcceleratorError)  # the CUDA context: no later case may run in it
            status: Literal["oom", "failed"] = "oom" if is_out_of_memory(error) and not lost else "failed"
            place = users_line(error) if self.runs_users_code else None
            kind = "" if isinstance(error, IN_OUR_WORDS) else f"{type(error).__name__}: "
            text = f"{kind}{one_line(error)}" + (f" ({place})" if place else "")
            return protocol.Refused(status=status, error=text, ends=lost)

    def _carry_out(self, request: protocol.Request) -> protocol.Reply:
        match request:
            case protocol.Load():
                return self.load(request)
            case protocol.MakeReference() | protocol.MakeText():
                return self.make(request)
            case protocol.CheckCase():
                return self.check(request)
            case protocol.Judge():
                return self.judge(request)
            case protocol.TakeTurn():
                return self.take_turn(lockstep=request.lockstep)
            case protocol.GoOn():
                return protocol.Refused(status="failed", error="no turn is paused")
            case protocol.TimeFramework():
                return protocol.FrameworkTimed(step_ns=framework.time_steps(self.strategy, self.case, self.clock))
            case protocol.ChooseCeilings():
                return self.choose_ceilings(request)
            case protocol.TakeCeilingTurn():
                return self.take_ceiling_turn(request.ceiling)

    def load(self, request: protocol.Load) -> protocol.Loaded:
        """Load the model and build the strategy; from here on the garbage collector is off."""
        group = request.group
        torch.set_num_threads(group.n_threads)
        self.runs_users_code = group.model.startswith("py:") or request.strategy.startswith(OWN)
        self.device = DEVICES[group.device]
        self.model = models.load(
            group.model,
            dtype=group.dtype,
            device=group.device,
            attn_implementation=group.attn_implementation,
            seed=request.seed,
        )
        if request.strategy:
            self.strategy = build(
                request.strategy,
                self.model,
                naive_logits=request.naive_logits,
                prefill_as_stored=request.prefill_quantized,
                kernels=request.kernels,
            )
        chosen: dict[str, str] = {}
        for batch_size in request.kernels_for:
            chosen |= self.strategy.choose_kernels(batch_size)
        self.clock = self.device.clock()
        self.covariates = CovariateReader(self.device)
        gc.collect()
        gc.freeze()
        gc.disable()
        return protocol.Loaded(
            version=protocol.VERSION,
            code=str(Path(__file__).resolve().parent.parent),
            lockstep=True,
            prefill_quantized=request.prefill_quantized,
            kernels=chosen,
            exact=bool(request.strategy) and not self._is_lossy,
        )

    def make(self, request: protocol.MakeReference | protocol.MakeText) -> protocol.Done | protocol.TextMade:
        """Store what cases are checked against, or what lossy ones are judged by."""
        made: protocol.Done | protocol.TextMade = protocol.Done()
        if isinstance(request, protocol.MakeText):
            made = make_text(self.model, request, self.device.available_memory_bytes())
        else:
            make_reference(self.model, request.case, Path(request.path), self.device.available_memory_bytes())
        self.device.give_back_memory()
        return made

    def judge(self, request: protocol.Judge) -> protocol.Judged:
        """Judge the strategy by the stored text, if it is lossy.

        Where a position depends on later ones, one parallel forward over a text is no measure of what a cache loses.
        """
        started = time.monotonic()
        if self._is_lossy and read_reference(request.path, self.device.name).prefix_stable:
            self.strategy.release()
            n_threads = torch.get_num_threads()
            torch.set_num_threads(request.n_threads)
            seed_generators(request.case.seed)
            try:
                self.judged = request.case, judge_by_text(self.strategy, request.text, self.device.name)
            finally:
                torch.set_num_threads(n_threads)
            self.strategy.release()
            self.is_warm = True
        return protocol.Judged(spent_s=time.monotonic() - started)

    def check(self, request: protocol.CheckCase) -> protocol.Checked:
        """Compare the strategy with the stored reference.

        Raises:
            OtherTokens: the strategy promises to be exact although its kind may be lossy, and is not.
        """
        case, count = request.case, request.count
        self.case, self.tokens_per_turn = case, request.tokens_per_turn
        context, self.prompt = ids_for(self.model, case)
        self.strategy.release()
        judging = self.judged if self.judged is not None and self.judged[0] == case else None
        judged = None if judging is None else judging[1]
        reference, weight = read_reference(request.path, self.device.name), None
        depends_on_later, rounding, expected = not reference.prefix_stable, reference.rounding, reference.tokens
        by_naive, source = reference.by_naive, "naive's" if reference.by_naive else "the parallel forward's"
        with _as_other_tokens() if depends_on_later else nullcontext():
            if count and self.is_warm:
                del reference  # its logits would be weighed too
                weight = self._weigh(context, expected)
                reference = read_reference(request.path, self.device.name)
            self._prepare(context)
            self._begin_alike()
            phases = PhaseCounter(self.strategy)
            compiles = self.strategy.compile_s is not None
            with phases.counted() if count and not compiles else nullcontext():
                forced = not self._is_lossy
                found = agreement(self.strategy, self.prompt, reference, self._steps(), phases.apart, forced=forced)
        compile_s = self.strategy.compile_s
        if compile_s is not None:
            compile_s, self.compiled_s = compile_s - self.compiled_s, compile_s
        self.strategy.check_length(case.capacity - 1)
        if found.tokens_match == "false" and is_lossy(case.strategy) and not self._is_lossy:
            raise OtherTokens(
                f"{case.strategy} promises to be exact, and its logits differ from {source} by "
                f"{found.logits_error:.1e} of the largest logit"
            )
        self.tokens_match = found.tokens_match
        del reference
        if self._is_lossy:
            matching = equal_tokens(found.tokens, expected)
            self.tokens_match = "true" if matching == case.n_gen else "false"
            judged = judged and msgspec.structs.replace(judged, matching_tokens=matching)
            expected = found.tokens
        # The logits are no longer needed. Timed turns of a lossy strategy are compared with its own free run.
        self.expected = Reference(expected, torch.empty(0))
        if count and compiles:
            phases.count_eager(self.prompt, expected)
        self.is_warm = True
        if count and weight is None:
            weight = self._weigh(context, expected)
            self._prepare(context)
            self.strategy.generate(self.prompt, 1)  # weighing gave memory back; no timed turn is to pay for getting it
        facts = vars(found) | {"tokens_match": self.tokens_match}
        del facts["tokens"]
        return protocol.Checked(
            **facts,
            peak_memory_bytes=weight and weight.peak,
            peak_beyond_weights_bytes=weight and weight.beyond_weights,
            growth_bytes=weight and weight.growth,
            compile_s=compile_s,
            counters=phases.counters if count else None,
            exact=not self._is_lossy,
            kernels=self.strategy.kernels,
            replays=self.strategy.replays,
            quality=judged,
            reference_rounding=rounding,
            reference_by_naive=by_naive,
            depends_on_later=depends_on_later or (judging is not None and judged is None),
        )

    def _prepare(self, context: Tensor | None) -> None:
        case = self.case
        self.strategy.release()  # two caches at once may not fit
        self.strategy.prepare(case.batch_size, case.capacity, context, prompt_length=case.n_depth + case.n_prompt)

    def _begin_alike(self) -> None:
        """Reset, with the same random numbers to come each time: a cache that evicts by chance then repeats itself."""
        seed_generators(self.case.seed)
        self.strategy.reset()

    def _weigh(self, context: Tensor | None, tokens: Tensor) -> Weight:
        ids = self.prompt if context is None else torch.cat([context, self.prompt], dim=1)
        return weigh(self.strategy, self.device, ids, tokens, self._steps())

    @property
    def _is_lossy(self) -> bool:
        return self.strategy.promise == "lossy"

    def take_turn(self, *, lockstep: bool) -> protocol.TurnTaken:
        """Time a prefill and its decode steps.

        Raises:
            OtherTokens: they are not those of the check.
        """
        steps = self._steps()
        forced = self.expected.tokens if steps is not None else None
        self._begin_alike()
        clock = self._pausing_clock() if lockstep else self.clock
        stamp = stamping(clock)
        self.covariates.start()
        clock.start()
        tokens = self.strategy.generate(self.prompt, self.case.n_gen, stamp, forced=forced, steps=steps)
        times = clock.stop()
        covariates = self.covariates.stop()
        self._refuse_other_tokens(tokens, steps)
        _refuse_no_time(times)
        timed = steps if steps is not None else range(1, self.case.n_gen)
        return protocol.TurnTaken(
            prefill_ns=times.host_ns[0],
            steps=list(timed),
            step_ns=times.host_ns[1:],
            prefill_event_ns=times.event_ns[0] if times.event_ns else None,
            step_event_ns=times.event_ns[1:] if times.event_ns else None,
            covariates=covariates,
        )

    def _pausing_clock(self) -> PausingClock:
        if self.pause is None or not self.case.on_host:
            raise Unsupported("turns in lockstep are for workers of a driver, on the CPU")
        return PausingClock(self.pause)

    def choose_ceilings(self, request: protocol.ChooseCeilings) -> protocol.CeilingsChosen:
        """Find the fastest kernels under these settings."""
        torch.set_num_threads(request.n_threads)
        device, setting = DEVICES[request.device], (request.device, request.dtype, request.n_threads)
        if self.ceilings_of != setting:
            self.covariates = CovariateReader(device)
            self.ceilings, self.ceilings_of = Ceilings(device, request.dtype), setting
        self.ceilings.choose(request.read_bytes, request.products)
        return protocol.CeilingsChosen(kernels=self.ceilings.kernels)

    def take_ceiling_turn(self, ceiling: CeilingName) -> protocol.CeilingTurnTaken:
        """Time the passes of a ceiling's kernel."""
        self.covariates.start()
        amount, pass_ns = self.ceilings.take_turn(ceiling)
        return protocol.CeilingTurnTaken(
            kernel=self.ceilings.kernels[ceiling],
            amount=amount,
            pass_ns=pass_ns,
            cache_bytes=self.ceilings.cache_bytes,
            read_bytes=amount if ceiling == "read_bandwidth" else None,
            covariates=self.covariates.stop(),
        )

    def _steps(self) -> list[int] | None:
        """Return which decode steps to compute: all (None), or every k-th one where a step needs no cache."""
        return None if self.strategy.reads_cache else naive_steps(self.case, self.tokens_per_turn)

    def _refuse_other_tokens(self, tokens: Tensor, steps: list[int] | None) -> None:
        computed = range(self.case.n_gen) if steps is None else [0, *steps]
        comparable = self.tokens_match == "true" or self._is_lossy  # not after a tie
        if comparable and not torch.equal(tokens, self.expected.tokens[:, list(computed)]):
            raise OtherTokens(
                f"{self.case.strategy} emitted other tokens in a timed turn than when it was checked: what an earlier "
                "round left is not put back, or it does not repeat itself"
            )


@contextmanager
def _as_other_tokens() -> Iterator[None]:
    """Call a model that reads no cache a mismatch, where one would have given other tokens anyway."""
    try:
        yield
    except CacheNotRead as reason:
        raise OtherTokens(f"{reason}; and earlier positions of this model depend on later ones") from reason


def seed_generators(seed: int) -> None:
    """Seed the generators that a user's code may draw from: torch's, numpy's and Python's."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  # its global generator is what code that names none draws from
    random.seed(seed)


def _refuse_no_time(times: Times) -> None:
    """Refuse a turn in which a forward took no time by the clock.

    It is refused when it is measured, not stored and left out later: 1 ns in its place would be untrue, and 0 ns has no
    ratio to anything.
    """
    if min([*times.host_ns, *(times.event_ns or [])]) <= 0:
        raise ValueError("the clock is too coarse: a forward took 0 ns by it; measure longer prompts or larger batches")


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message, for a table."""
    return (str(error).strip() or "no message").splitlines()[0]


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer requests, a line each, until there are no more."""
    decode = msgspec.json.Decoder(protocol.Request).decode

    def send(reply: protocol.Reply) -> None:
        replies.write(msgspec.json.encode(reply) + b"\n")
        replies.flush()

    def pause() -> None:
        try:
            send(protocol.Paused())
            line = requests.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            raise SystemExit  # the driver is gone
        request = decode(line)
        if not isinstance(request, protocol.GoOn):
            raise TypeError(f"{type(request).__name__} is no answer to Paused")

    worker = Worker(pause)
    for line in requests:
        reply = worker.answer(decode(line))
        send(reply)
        if isinstance(reply, protocol.Refused) and reply.ends:
            return
