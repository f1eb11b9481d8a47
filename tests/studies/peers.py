"""Measures other inference engines beside kvbench's strategies on the same weights (10 min; npm is needed).

CTranslate2, llama.cpp, onnxruntime-genai and OpenVINO: each is a process of its own, in an environment of its own, that
sleeps while another has the turn; they take turns in the same rounds, in alternating directions. Tokens are checked
first: an engine with an exact cache is timed if its tokens are naive greedy re-feed's, or part from them at a near tie
within the tolerance of the data type; the table shows where. `--kv quantised` compares the engines' quantised caches
with kvbench's. `nox -s study -- peers` installs the engines. Prints one Markdown table. No time is asserted.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

import cpuinfo
import msgspec
from safetensors.torch import load_file

from bench.case import Case
from bench.machine.affinity import usable_cores
from bench.measure.references import token_ids
from bench.measure.server_process import RunServers
from bench.measure.worker_process import WorkerFailed
from bench.naming import namer
from bench.protocol import Load, MakeReference
from kvcache import models
from kvcache.models import ModelError
from tests.studies.overhead import turns
from tests.studies.peer_contenders import OTHERS, Cell, Competitor, peer, strategy
from tests.studies.peer_process import TIMEOUT_S, PeerFailed
from tests.studies.peer_table import HEAD, YARDSTICK, Findings, row, say
from tests.studies.peer_weights import ExportFailed

LINE_UPS = {
    "exact": ("dynamic", "compiled", "hf-generate", *(name for name, (_, kv) in OTHERS.items() if not kv)),
    "quantised": ("compiled", "compiled-int8", "compiled-int4", *(name for name, (_, kv) in OTHERS.items() if kv)),
}
"""What `--kv` measures; `compiled`, the yardstick, is in both."""

WARMUPS = 1
"""Rounds that are not counted; each engine has run once before, when its tokens were checked."""
IDLE_NS = 20_000_000
"""CPU time in the turns of others, per round, above which an engine is named: two ticks of Linux's counter."""


def measure(case: Case, names: list[str], rounds: int, end_s: float, findings: Findings) -> None:
    """Add a line for every engine of `names` to the findings; rounds end at `end_s` by time.monotonic."""
    with ExitStack() as stack:
        servers = stack.enter_context(RunServers())
        say(f"{case.dtype}: naive re-feed's tokens")
        cell = expectations(case, servers, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        competitors: list[Competitor] = []
        for name in names:
            say(f"{case.dtype}: {name} is loaded and checked")
            try:
                if name in OTHERS:
                    competitors.append(peer(name, cell, stack, findings))
                else:
                    competitors.append(strategy(name, cell, servers, stack))
            except (PeerFailed, ExportFailed, WorkerFailed, ModelError, ImportError) as error:
                findings.leave_out(name, case.dtype, "-", error)
        longest_s = 0.0
        for number in range(-WARMUPS, rounds):
            start_s = time.monotonic()
            if number > 0 and start_s + longest_s > end_s:
                findings.note(f"{case.dtype}: {number} of {rounds} rounds, since --minutes are over")
                break
            say(f"{case.dtype}: round {number + 1} of {rounds}" if number >= 0 else f"{case.dtype}: warm-up")
            one_round(competitors, number, case.dtype, findings)
            longest_s = max(longest_s, time.monotonic() - start_s)
        yardstick = next((competitor.times for competitor in competitors if competitor.name == YARDSTICK), [])
        for found in competitors:
            if found.idle_ns > IDLE_NS * len(found.times):
                findings.note(f"{case.dtype}: {found.name} took {found.idle_ns / 1e6:.0f} ms of CPU in others' turns")
            findings.lines.append(row(case.dtype, found.name, found.kv, found.tokens, found.times, yardstick))


def expectations(case: Case, servers: RunServers, folder: Path) -> Cell:
    """Have naive re-feed's tokens and logits found."""
    reference = folder / "reference.safetensors"
    with servers.fork(case.model, case.n_threads) as arm:
        arm.ask(Load(group=case.group, strategy="", naive_logits="last", seed=case.seed), TIMEOUT_S)
        arm.ask(MakeReference(case=case, path=str(reference)), TIMEOUT_S)
    stored = load_file(reference)
    context, prompt = token_ids(case, models.describe(case.model).vocab_size)
    return Cell(
        case=case,
        reference=reference,
        context=[] if context is None else context[0].tolist(),
        prompt=prompt[0].tolist(),
        expected=stored["tokens"][0].tolist(),
        logits=stored["logits"][0].float().numpy(),
    )


def one_round(competitors: list[Competitor], number: int, dtype: str, findings: Findings) -> None:
    """Have each take a turn; one that fails is left out from here on."""
    by_name = {competitor.name: competitor for competitor in competitors}
    for name in turns(list(by_name), number):
        others = [competitor for competitor in competitors if competitor.name != name]
        before = [competitor.cpu_ns() for competitor in others]
        try:
            taken = by_name[name].turn()
        except (PeerFailed, WorkerFailed) as error:
            competitors.remove(by_name[name])
            findings.leave_out(name, dtype, by_name[name].kv, error)
            continue
        if number >= 0:
            by_name[name].times.append(taken)
            for other, used in zip(others, before, strict=True):
                other.idle_ns += max(0, other.cpu_ns() - used)


def parser() -> argparse.ArgumentParser:
    """Define the arguments."""
    found = argparse.ArgumentParser(
        prog="nox -s study -- peers", description=__doc__.splitlines()[0] if __doc__ else None
    )
    found.add_argument("--model", default="smollm2-135m", help="any spec whose architecture is Llama's")
    found.add_argument("--n-prompt", type=int, default=128)
    found.add_argument("--n-gen", type=int, default=64)
    found.add_argument("--n-depth", type=int, default=0, help="tokens in the cache before the prompt, untimed")
    found.add_argument("--threads", type=int, default=usable_cores())
    found.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    found.add_argument("--kv", default="exact", choices=list(LINE_UPS), help="how the cache is kept")
    names = list(dict.fromkeys(name for line_up in LINE_UPS.values() for name in line_up))
    found.add_argument("--engines", nargs="+", choices=names, metavar="NAME", help=f"of: {', '.join(names)}")
    found.add_argument("--rounds", type=int, default=12, help="six at least give an interval")
    found.add_argument("--minutes", type=float, default=8.0, help="no round begins that would end later")
    return found


def main() -> None:
    """Measure, and print the table."""
    arguments = parser().parse_args()
    if min(arguments.n_prompt, arguments.n_gen - 1, arguments.threads, arguments.rounds) < 1 or arguments.n_depth < 0:
        parser().error("--n-prompt, --threads and --rounds need at least 1, --n-gen at least 2, --n-depth 0")
    try:
        models.describe(arguments.model)
    except ModelError as error:
        parser().error(f"--model {arguments.model}: {error}")
    findings = Findings(versions={name: f"{name} {version(name)}" for name in ("torch", "transformers")})
    dtypes, names = (
        list(dict.fromkeys(arguments.dtype)),
        list(dict.fromkeys(arguments.engines or LINE_UPS[arguments.kv])),
    )
    case = Case(
        model=arguments.model,
        strategy="",
        device="cpu",
        dtype="",
        attn_implementation="sdpa",
        n_threads=arguments.threads,
        batch_size=1,
        n_prompt=arguments.n_prompt,
        n_gen=arguments.n_gen,
        n_depth=arguments.n_depth,
        seed=0,
    )
    start_s = time.monotonic()
    for number, dtype in enumerate(dtypes, 1):
        end_s = start_s + arguments.minutes * 60 * number / len(dtypes)
        measure(msgspec.structs.replace(case, dtype=dtype), names, arguments.rounds, end_s, findings)
    cpu = cpuinfo.get_cpu_info().get("brand_raw", platform.processor())
    print(f"{case.model}, {namer([case])(case)}, {case.n_threads} threads, {arguments.rounds} rounds, {cpu}\n\n{HEAD}")
    print("\n".join(findings.lines))
    if findings.notes:
        print("\n" + "\n".join(f"{number}. {note}" for number, note in enumerate(findings.notes, 1)))
    print("\n" + "\n".join(f"- {line}" for line in findings.versions.values()))


if __name__ == "__main__":
    main()
