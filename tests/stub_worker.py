"""A fork server whose workers speak the protocol without torch and do as scripted. Run as bench/fork_server.py is.

The environment variable STUB holds a script, a JSON object: strategy ("" makes the references, "ceilings" has the
roofs' turns) -> a list of acts. An act is `{"at": N, "do": ...}`: what to do at the N-th turn (from 0; warm-ups count)
of each worker of that strategy, at every turn without `at`, or `"on"` another request than "turn" (its tag in
bench/protocol.py):

- "crash" ends with exit code 7 and a last line on standard error, "kill" ends by SIGKILL, "hang" never answers;
- "refuse" answers as `status` (default failed) and `error` say, and then ends if `ends`; "wrong" emits other tokens;
- "slow" takes `seconds` in truth before it answers.

`"times": K` does it only in the first K workers that get there, over all processes of a test (counted by files in the
folder STUB_FOLDER). Times are of no clock: a prefill takes a nanosecond per token and a step one.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import msgspec

import bench
from bench import fork_server, protocol
from bench.case import Case, naive_steps
from bench.protocol import (
    VERSION,
    CeilingsChosen,
    CeilingTurnTaken,
    CheckCase,
    Checked,
    ChooseCeilings,
    Done,
    FrameworkTimed,
    GoOn,
    Judge,
    Judged,
    Load,
    Loaded,
    MakeReference,
    MakeText,
    Paused,
    Refused,
    Reply,
    Request,
    TakeCeilingTurn,
    TakeTurn,
    TextMade,
    TimeFramework,
    TurnTaken,
)
from bench.record import Covariates
from kvcache.strategies.catalogue import REFEEDING

Act = dict[str, Any]


class StubWorker:
    """Answers every request at once, but where the script says otherwise."""

    def __init__(self, requests: BinaryIO, replies: BinaryIO, script: dict[str, list[Act]]) -> None:
        self.requests, self.replies, self.script = requests, replies, script
        self.strategy, self.wrong = "", False
        self.kernels: dict[str, str] | None = None
        self.counts: dict[str, int] = {}
        self.decode = msgspec.json.Decoder(Request).decode

    def serve(self) -> None:
        for line in self.requests:
            reply = self.answer(self.decode(line))
            self.send(reply)
            if isinstance(reply, Refused) and reply.ends:
                return

    def send(self, reply: Reply) -> None:
        self.replies.write(msgspec.json.encode(reply) + b"\n")
        self.replies.flush()

    def answer(self, request: Request) -> Reply:
        if isinstance(request, Load):
            self.strategy, self.kernels = request.strategy, request.kernels
        if isinstance(request, ChooseCeilings):
            self.strategy = "ceilings"
        tag = str(msgspec.to_builtins(request)["type"])
        number = self.counts.get(tag, 0)
        self.counts[tag] = number + 1
        for act in self.script.get(self.strategy, []):
            if act.get("on", "turn") == tag and act.get("at", number) == number and self.may(act):
                refusal = self.act(act)
                if refusal is not None:
                    return refusal
        return self.honest(request)

    def may(self, act: Act) -> bool:
        """Whether an act that is done a few times only is not done up yet."""
        for number in range(act.get("times", 1_000_000)):
            if "times" not in act:
                return True
            mark = Path(os.environ["STUB_FOLDER"], f"{self.strategy}-{act['do']}-{act.get('at', 0)}-{number}")
            try:
                mark.touch(exist_ok=False)
            except FileExistsError:
                continue
            return True
        return False

    def act(self, act: Act) -> Refused | None:
        match act["do"]:
            case "crash":
                sys.stderr.write("stub: crashed as scripted\n")
                sys.stderr.flush()
                os._exit(7)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                signal.pause()
            case "slow":
                time.sleep(act["seconds"])
            case "say kernels":
                return Refused(status="failed", error=f"kernels: {self.kernels}")
            case "wrong":
                self.wrong = True
            case "refuse":
                return Refused(
                    status=act.get("status", "failed"),
                    error=act.get("error", "refused as scripted"),
                    ends=act.get("ends", False),
                )
        return None

    def honest(self, request: Request) -> Reply:
        match request:
            case Load():
                return Loaded(version=VERSION, code="", lockstep=True)
            case MakeReference() | MakeText():
                Path(request.path).touch()
                return TextMade(writer="stub", tokens=[[1]]) if isinstance(request, MakeText) else Done()
            case CheckCase():
                self.case, self.tokens_per_turn = request.case, request.tokens_per_turn
                return self.checked(request.case)
            case TakeTurn():
                if request.lockstep:
                    self.pause()
                return self.turn(self.case)
            case GoOn():
                return Refused(status="failed", error="no turn is paused")
            case Judge() | TimeFramework():
                return Judged(spent_s=0.0) if isinstance(request, Judge) else FrameworkTimed(step_ns=[1, 1])
            case ChooseCeilings():
                return CeilingsChosen(kernels={"read_bandwidth": "stub", "gemm": "stub"})
            case TakeCeilingTurn():
                return CeilingTurnTaken(
                    kernel="stub", amount=1000, pass_ns=[3, 2, 2], cache_bytes=1 << 20, covariates=Covariates()
                )

    def checked(self, case: Case) -> Checked:
        held = 0 if case.strategy in REFEEDING else 8 * case.batch_size
        return Checked(
            tokens_match="false" if self.wrong else "true",
            logits_error=0.5 if self.wrong else 1e-6,
            positions_checked=case.n_gen,
            kv_bytes_after_prefill=held * (case.n_depth + case.n_prompt),
            kv_bytes_after_decode=held * (case.capacity - 1),
            peak_memory_bytes=1 << 28,
            compile_s=None,
            counters={},
        )

    def turn(self, case: Case) -> Reply:
        if self.wrong:
            error = f"{case.strategy} emitted other tokens in a timed turn than when it was checked"
            return Refused(status="failed", error=error, tokens_match="false")
        steps = naive_steps(case, self.tokens_per_turn) if case.strategy in REFEEDING else list(range(1, case.n_gen))
        return TurnTaken(
            prefill_ns=1000 * case.n_prompt,
            steps=steps,
            step_ns=[1000 * (case.n_prompt + step if case.strategy in REFEEDING else 1) for step in steps],
            prefill_event_ns=None,
            step_event_ns=None,
            covariates=Covariates(steal_ns=0, stall_ns=0, involuntary_switches=0, page_faults=0),
        )

    def pause(self) -> None:
        """Stop after each token, as a turn in lockstep does."""
        for _ in range(self.case.n_gen):
            self.send(Paused())
            line = self.requests.readline()
            if not line:
                raise SystemExit  # the driver is gone
            assert isinstance(self.decode(line), GoOn)


def introduction(model: str) -> dict[str, str | int | None]:
    """Return what bench/fork_server.py prints, without torch; the JSON object in STUB_FACTS adds to it."""
    return {
        "version": protocol.VERSION,
        "code": str(Path(protocol.__file__).resolve().parents[1]),
        "python": "3",
        "torch": "none",
        "transformers": "none",
        "isa": "stub",
        **json.loads(os.environ.get("STUB_FACTS", "{}")),
    }


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    StubWorker(requests, replies, json.loads(os.environ.get("STUB", "{}"))).serve()


def module(name: str, **members: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(members)
    sys.modules[name] = made
    return made


if __name__ == "__main__":
    # The real server, over a worker and a torch that are none.
    sys.modules["transformers"] = None  # type: ignore[assignment]  # whoever imports it fails
    module("torch", set_num_interop_threads=lambda n: None)
    bench.worker = module("bench.worker", serve=serve)
    fork_server.introduction = introduction
    fork_server.main(*sys.argv[1:])
