"""One process = one peer: another inference engine, that generates greedily when asked and sleeps otherwise.

Knows nothing of torch, whose threads and allocator must not meet the engine's own. Reads a JSON document a line on
standard input and answers on standard output: first `Load`, then any number of `Generate`.
"""

import os
import sys
import time

import msgspec
import numpy as np

from tests.studies.peer_engines import ENGINES
from tests.studies.peer_protocol import Engine, Failure, Generate, Generated, Load, Loaded, Reply, Request


def generated(engine: Engine, request: Generate) -> Generated:
    """Take one turn."""
    tokens: list[int] = []
    stamps: list[int] = []
    first: list[float] = []

    def emit(token: int, logits: np.ndarray | None) -> None:
        stamps.append(time.perf_counter_ns())
        tokens.append(token)
        if request.logits and logits is not None and not first:
            first.extend(logits.tolist())

    engine.prepare(request)
    start = time.perf_counter_ns()
    engine.generate(request, emit)
    return Generated(tokens=tokens, ns=np.diff([start, *stamps]).tolist(), logits=first or None)


def serve() -> None:
    """Serve on standard input and output; what an engine prints goes to standard error."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    decode = msgspec.json.Decoder(Request).decode
    engine: Engine | None = None
    for line in sys.stdin.buffer:
        reply: Reply
        try:
            request = decode(line)
            if isinstance(request, Load):
                engine = ENGINES[request.engine](request)
                reply = Loaded(description=engine.description, kv=engine.kv)
            else:
                assert engine is not None
                reply = generated(engine, request)
        except Exception as error:  # noqa: BLE001  # whatever an engine raises is the answer
            reply = Failure(error=" ".join(f"{type(error).__name__}: {error}".split()))
        replies.write(msgspec.json.encode(reply) + b"\n")
        replies.flush()


if __name__ == "__main__":
    serve()
