import os
import re

import numpy as np
import pytest
import torch

from kvcache.proof.tokens import reference
from kvcache.strategies.catalogue import STRATEGIES as NAMES
from kvcache.strategies.tolerance import difference, largest
from tests.studies import peer_engines, peers
from tests.studies.peer_contenders import OTHERS
from tests.studies.peer_process import Peer, PeerFailed
from tests.studies.peer_protocol import Generate, Load
from tests.studies.peer_table import YARDSTICK, Findings, parting, row
from tests.studies.peer_weights import write
from tests.tiny import ARCHITECTURES, VOCAB_SIZE

QUANTISED = {"llama.cpp": "q8_0", "openvino": "u8"}
N_PROMPT, N_GEN = 24, 24


@pytest.fixture(params=peer_engines.ENGINES)
def engine(request):
    try:
        peer_engines.python_of(request.param)
    except ImportError as error:
        pytest.skip(f"{error} (nox -s study -- peers)")
    return request.param


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def model(request, engine):
    if engine in peer_engines.PYTHONS and not request.param:
        pytest.skip("an export takes half a minute: one is enough")
    # Heads of 32 features: llama.cpp quantises blocks of so many.
    return ARCHITECTURES["llama"](tie_word_embeddings=request.param, hidden_size=128)


def loaded(worker, engine, folder, kv, absent):
    load = Load(
        engine=engine,
        weights=str(folder),
        dtype="float32",
        kv=kv,
        n_threads=1,
        capacity=N_PROMPT + N_GEN,
        absent=absent,
    )
    return worker.ask(load)


def off(logits, expected):
    return difference(expected.logits[0, 0], torch.tensor(logits), largest(expected.logits))


@pytest.mark.peers
def test_a_peer_emits_the_tokens_of_naive_re_feed(engine, model, tmp_path):
    prompt = torch.randint(VOCAB_SIZE, (1, N_PROMPT), generator=torch.Generator().manual_seed(0))
    expected = reference(model, prompt, N_GEN)
    tokens = expected.tokens[0].tolist()
    assert len(set(tokens)) > 3  # a model that repeats one token would hide a wrong position
    absent = next(token for token in range(VOCAB_SIZE) if token not in tokens)

    write(engine, model, "float32", tmp_path)
    whole = Generate(context=[], prompt=prompt[0].tolist(), n_gen=N_GEN, logits=True)
    split = Generate(context=prompt[0, :9].tolist(), prompt=prompt[0, 9:].tolist(), n_gen=N_GEN, logits=True)
    with Peer(engine, dict(os.environ)) as worker:
        assert loaded(worker, engine, tmp_path, "float32", absent).kv == "float32"
        found = [worker.ask(request) for request in (whole, whole, split, whole, split, split)]
        if engine in QUANTISED:
            held = loaded(worker, engine, tmp_path, QUANTISED[engine], absent)
            assert held.kv == QUANTISED[engine]
            lossy = worker.ask(split)
    for generated in found:
        assert generated.tokens == tokens
        assert len(generated.ns) == N_GEN
        assert min(generated.ns) > 0
    errors = [off(generated.logits, expected) for generated in found if generated.logits is not None]
    assert max(errors, default=0.0) < 1e-3  # llama.cpp is the furthest off, also without a cache
    if engine in QUANTISED:  # what was in the cache before the prompt is not kept exactly
        assert len(lossy.tokens) == N_GEN
        assert off(lossy.logits, expected) > 2 * max(errors)


def test_what_a_peer_cannot_do_is_said_in_one_line():
    with Peer("nothing", dict(os.environ)) as worker, pytest.raises(PeerFailed, match=r"^KeyError: 'nothing'$"):
        loaded(worker, "nothing", "", "float32", 0)


def test_a_peer_that_dies_is_told_by_its_exit_code():
    with Peer("nothing", dict(os.environ)) as worker:
        worker._process.kill()
        with pytest.raises(PeerFailed, match="exit code -9"):
            worker.ask(Generate(context=[], prompt=[1], n_gen=1))


def test_an_engine_that_is_not_installed_is_named_with_its_variable(monkeypatch):
    monkeypatch.delenv("KVBENCH_OPENVINO", raising=False)
    with pytest.raises(ImportError, match="openvino is not installed: KVBENCH_OPENVINO names no Python"):
        peer_engines.python_of("openvino")


def test_a_line_of_the_table_divides_by_compiled_in_the_same_rounds():
    slow = [(20.0 * drift, 6.0 * drift) for drift in (1.0, 1.5, 2.0, 3.0, 2.5, 1.2)]
    fast = [(ttft / 2, tpot / 3) for ttft, tpot in slow]
    own = row("float32", "compiled", "float32", "same", fast, fast)
    other = row("float32", "llama.cpp", "float32", "same", slow, fast)
    assert own == "| float32 | compiled | float32 | same | 17.5 | - | 3.5 | - |"
    assert re.findall(r"(\d\.\d\d) \[(\S+)-(\S+)\]", other) == [("2.00", "2.00", "2.00"), ("3.00", "3.00", "3.00")]


def test_an_engine_without_times_has_a_line_and_its_reason_in_a_note():
    findings = Findings(notes=["another"])
    findings.leave_out("ctranslate2", "bfloat16", "-", "it computes in float32 on this processor")
    assert findings.lines == ["| bfloat16 | ctranslate2 | - | not timed (2) | - | - | - | - |"]
    assert findings.notes[1] == "ctranslate2, bfloat16: it computes in float32 on this processor"


def test_where_tokens_part_and_whether_that_was_a_tie():
    logits = np.array([[0.0, 4.0, 3.99], [0.0, 8.0, 1.0]])
    assert parting([1, 1], [1, 1], logits, 1e-2) == "same"
    assert parting([2, 0], [1, 1], logits, 1e-2) == "0 of 2 same, then a tie (1.2e-03)"
    assert parting([1, 2], [1, 1], logits, 1e-2) == "1 of 2 same, then others (8.8e-01)"
    assert parting([1], [1, 1], logits, 1e-2) == "1 of 2 only"


def test_every_line_up_holds_the_yardstick_and_only_names_that_there_are():
    for line_up in peers.LINE_UPS.values():
        assert YARDSTICK in line_up
        assert set(line_up) <= {*NAMES, *OTHERS}
