"""Measures CTranslate2 and llama.cpp beside kvbench's strategies on the same weights (7 min; npm is needed).

Every engine is a process of its own that sleeps while another has the turn; they take turns in the same rounds, in
alternating directions. Tokens are checked first: in float32 an engine whose tokens differ from naive greedy re-feed's
is not timed; in bfloat16, where two correct computations may choose differently at a near tie, the table shows the
position. `nox -s study -- peers` installs the engines. Prints one Markdown table. No time is asserted.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import cpuinfo
import msgspec
import numpy as np
import psutil
from safetensors.torch import load_file

from bench.analysis.estimators import paired_ratio
from bench.case import Case
from bench.machine.affinity import usable_cores
from bench.measure.references import token_ids
from bench.measure.server_process import TREE, RunServers, worker_environment
from bench.measure.worker_process import WorkerFailed
from bench.protocol import CheckCase, Checked, Load, MakeReference, TakeTurn, TurnTaken
from kvcache import models
from kvcache.models import ModelError
from tests.studies import peer_worker
from tests.studies.overhead import Times, turns
from tests.studies.peer_weights import converted
from tests.studies.peer_worker import ENGINES, Failure, Generate, Generated, Loaded, check_installed

STRATEGIES = ("dynamic", "compiled", "hf-generate")
YARDSTICK = "compiled"
WARMUPS = 2
TIMEOUT_S = 600.0
IDLE_NS = 20_000_000
"""CPU time in the turns of others, per round, above which an engine is named: two ticks of Linux's counter."""


class PeerFailed(Exception):
    """An engine cannot do what it was asked for; the message says why."""


class Peer:
    """The driver's end of a peer's process. Use as a context manager: leaving it ends the process."""

    def __init__(self, n_threads: int, environment: dict[str, str]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.studies.peer_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=TREE,
            env=environment,
        )
        self._usage = psutil.Process(self._process.pid)

    def cpu_ns(self) -> int:
        """CPU time that the process has used so far."""
        times = self._usage.cpu_times()
        return int((times.user + times.system) * 1e9)

    def ask(self, request: peer_worker.Request) -> Loaded | Generated:
        """The answer to `request`; PeerFailed where there is none within TIMEOUT_S."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        limit = threading.Timer(TIMEOUT_S, self._process.kill)
        limit.start()
        try:
            self._process.stdin.write(msgspec.json.encode(request) + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        finally:
            limit.cancel()
        if not line:
            self._errors.seek(0)
            last = self._errors.read().decode(errors="replace").strip().splitlines()[-1:]
            raise PeerFailed(
                f"its process ended with exit code {self._process.wait()}{''.join(f': {x}' for x in last)}"
            )
        reply: peer_worker.Reply = msgspec.json.decode(line, type=peer_worker.Reply)
        if isinstance(reply, Failure):
            raise PeerFailed(reply.error)
        return reply

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._errors.close()


@dataclass
class Competitor:
    """What takes turns, and what is known of it."""

    name: str
    turn: Callable[[], Times]
    tokens: str
    cpu_ns: Callable[[], int]
    """CPU time that its process has used so far."""
    times: list[Times] = field(default_factory=list)
    idle_ns: int = 0
    """CPU time that its process took in the turns of others: it should sleep."""


def strategy(name: str, case: Case, reference: Path, servers: RunServers, stack: ExitStack) -> Competitor:
    """A strategy of kvbench, in a worker of its own, checked."""
    case = msgspec.structs.replace(case, strategy=name)
    arm = stack.enter_context(servers.fork(case.model, case.n_threads))
    arm.ask(Load(group=case.group, strategy=name, naive_logits="last", seed=case.seed), TIMEOUT_S)
    checked = arm.ask(CheckCase(case=case, path=str(reference)), TIMEOUT_S)
    assert isinstance(checked, Checked)
    if checked.tokens_match == "false":
        raise PeerFailed(f"its logits differ by {checked.logits_error:.1e} of the largest")

    def turn() -> Times:
        taken = arm.ask(TakeTurn(), TIMEOUT_S)
        assert isinstance(taken, TurnTaken)
        return taken.prefill_ns / 1e6, statistics.fmean(taken.step_ns) / 1e6

    return Competitor(
        name, turn, "same" if checked.tokens_match == "true" else checked.tokens_match, lambda: arm.cpu_ns
    )


def peer(
    name: str, case: Case, prompt: list[int], expected: list[int], stack: ExitStack, versions: dict[str, str]
) -> Competitor:
    """Another engine, in a process of its own, its tokens compared with `expected`."""
    check_installed(name)
    weights = converted(name, case.model, case.dtype)
    worker = stack.enter_context(Peer(case.n_threads, worker_environment(case.n_threads)))
    load = peer_worker.Load(
        engine=name, weights=str(weights), dtype=case.dtype, n_threads=case.n_threads, capacity=case.capacity
    )
    loaded = worker.ask(load)
    assert isinstance(loaded, Loaded)
    versions[name] = loaded.description
    absent = next(token for token in range(len(expected) + 1) if token not in expected)
    request = Generate(prompt=prompt, n_gen=case.n_gen, absent=absent)

    def generate() -> Generated:
        generated = worker.ask(request)
        assert isinstance(generated, Generated)
        return generated

    first = generate().tokens
    if first != expected and case.dtype == "float32":
        raise PeerFailed(f"it emits other tokens: {parting(first, expected)}")

    def turn() -> Times:
        taken = generate()
        if taken.tokens != first:
            raise PeerFailed("it emitted other tokens in a timed turn than when it was checked")
        return taken.ns[0] / 1e6, statistics.fmean(taken.ns[1:]) / 1e6

    return Competitor(name, turn, "same" if first == expected else parting(first, expected), worker.cpu_ns)


def parting(tokens: list[int], expected: list[int]) -> str:
    """Where two sequences part."""
    equal = next((at for at, (a, b) in enumerate(zip(tokens, expected, strict=False)) if a != b), len(tokens))
    return f"{equal} of {len(expected)} same, then others"


def measure(case: Case, rounds: int, versions: dict[str, str]) -> list[Competitor]:
    """Every engine that can run `case`, with its times; what cannot be run is said on stderr."""
    with ExitStack() as stack:
        servers = stack.enter_context(RunServers())
        reference = Path(stack.enter_context(tempfile.TemporaryDirectory()), "reference.safetensors")
        say(f"{case.dtype}: naive re-feed's tokens")
        with servers.fork(case.model, case.n_threads) as arm:
            arm.ask(Load(group=case.group, strategy="", naive_logits="last", seed=case.seed), TIMEOUT_S)
            arm.ask(MakeReference(case=case, path=str(reference)), TIMEOUT_S)
        expected = load_file(reference)["tokens"][0].tolist()
        vocab_size = models.describe(case.model).vocab_size
        prompt = token_ids(case, vocab_size)[1][0].tolist()
        competitors = []
        for name in (*STRATEGIES, *ENGINES):
            say(f"{case.dtype}: {name} is loaded and checked")
            try:
                if name in ENGINES:
                    competitors.append(peer(name, case, prompt, expected, stack, versions))
                else:
                    competitors.append(strategy(name, case, reference, servers, stack))
            except (PeerFailed, WorkerFailed, ModelError, ImportError) as error:
                say(f"{case.dtype}: {name} is left out: {error}")
        for number in range(-WARMUPS, rounds):
            say(f"{case.dtype}: round {number + 1} of {rounds}" if number >= 0 else f"{case.dtype}: warm-up")
            one_round(competitors, number)
        for competitor in competitors:
            if competitor.idle_ns > IDLE_NS * rounds:
                say(f"{case.dtype}: {competitor.name} took {competitor.idle_ns / 1e6:.0f} ms of CPU in others' turns")
        return competitors


def one_round(competitors: list[Competitor], number: int) -> None:
    """A turn each; one that fails is left out from here on."""
    by_name = {competitor.name: competitor for competitor in competitors}
    for name in turns(list(by_name), number):
        others = [competitor for competitor in competitors if competitor.name != name]
        before = [competitor.cpu_ns() for competitor in others]
        try:
            taken = by_name[name].turn()
        except (PeerFailed, WorkerFailed) as error:
            say(f"{name} is left out: {error}")
            competitors.remove(by_name[name])
            continue
        if number >= 0:
            by_name[name].times.append(taken)
            for other, used in zip(others, before, strict=True):
                other.idle_ns += max(0, other.cpu_ns() - used)


def rows(dtype: str, competitors: list[Competitor]) -> list[str]:
    """A line of the table for each engine."""
    yardstick = next((competitor.times for competitor in competitors if competitor.name == YARDSTICK), None)
    lines = []
    for competitor in competitors:
        cells = [dtype, competitor.name, competitor.tokens]
        for phase in range(2):
            own = [times[phase] for times in competitor.times]
            cells.append(f"{np.median(own):.1f}")
            cells.append("-")
            if yardstick is not None and competitor.name != YARDSTICK:
                ratio = paired_ratio(own, [times[phase] for times in yardstick])
                interval = "" if ratio.low is None else f" [{ratio.low:.2f}-{ratio.high:.2f}]"
                cells[-1] = f"{ratio.estimate:.2f}{interval}"
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        prog="nox -s study -- peers", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--model", default="smollm2-135m", help="any spec whose architecture is Llama's")
    parser.add_argument("--n-prompt", type=int, default=128)
    parser.add_argument("--n-gen", type=int, default=64)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=12, help="six at least give an interval")
    arguments = parser.parse_args()
    if min(arguments.n_prompt, arguments.n_gen - 1, arguments.threads, arguments.rounds) < 1:
        parser.error("--n-prompt, --threads and --rounds need at least 1, --n-gen at least 2")
    try:
        models.describe(arguments.model)
    except ModelError as error:
        parser.error(f"--model {arguments.model}: {error}")
    versions = {name: f"{name} {version(name)}" for name in ("torch", "transformers")}
    table = []
    for dtype in dict.fromkeys(arguments.dtype):
        case = Case(
            model=arguments.model,
            strategy="",
            device="cpu",
            dtype=dtype,
            attn_implementation="sdpa",
            n_threads=arguments.threads,
            batch_size=1,
            n_prompt=arguments.n_prompt,
            n_gen=arguments.n_gen,
            n_depth=0,
            seed=0,
        )
        table += rows(dtype, measure(case, arguments.rounds, versions))
    cpu = cpuinfo.get_cpu_info().get("brand_raw", platform.processor())
    print(
        f"{arguments.model}, pp{arguments.n_prompt}+tg{arguments.n_gen - 1}, {arguments.threads} threads, "
        f"{arguments.rounds} rounds, {cpu}\n\n"
        f"| dtype | engine | tokens | TTFT ms | TTFT / {YARDSTICK}'s | TPOT ms | TPOT / {YARDSTICK}'s |\n"
        "|---|---|---|---|---|---|---|"
    )
    print("\n".join(table))
    print("\n" + "\n".join(f"- {line}" for line in versions.values()))


if __name__ == "__main__":
    main()
