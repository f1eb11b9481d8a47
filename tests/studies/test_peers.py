import os
import re

import pytest
import torch

from kvcache.proof.tokens import reference
from tests.studies import peer_worker, peers
from tests.studies.peer_weights import write_ctranslate2, write_gguf
from tests.tiny import ARCHITECTURES, VOCAB_SIZE

N_PROMPT, N_GEN = 24, 24


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def model(request):
    return ARCHITECTURES["llama"](tie_word_embeddings=request.param)


@pytest.mark.peers
@pytest.mark.parametrize("engine", peer_worker.ENGINES)
def test_a_peer_emits_the_tokens_of_naive_re_feed(engine, model, tmp_path):
    try:
        peer_worker.check_installed(engine)
    except ImportError as error:
        pytest.skip(f"{error} (nox -s study -- peers)")
    prompt = torch.randint(VOCAB_SIZE, (1, N_PROMPT), generator=torch.Generator().manual_seed(0))
    expected = reference(model, prompt, N_GEN).tokens[0].tolist()
    assert len(set(expected)) > 3  # a model that repeats one token would hide a wrong position

    if engine == "ctranslate2":
        write_ctranslate2(model, tmp_path)
    else:
        write_gguf(model, "float32", tmp_path / "model.gguf")
    load = peer_worker.Load(
        engine=engine, weights=str(tmp_path), dtype="float32", n_threads=1, capacity=N_PROMPT + N_GEN
    )
    absent = next(token for token in range(VOCAB_SIZE) if token not in expected)
    request = peer_worker.Generate(prompt=prompt[0].tolist(), n_gen=N_GEN, absent=absent)
    with peers.Peer(1, dict(os.environ)) as worker:
        worker.ask(load)
        first, second = worker.ask(request), worker.ask(request)
    assert first.tokens == second.tokens == expected
    assert len(first.ns) == N_GEN
    assert min(first.ns) > 0


def test_what_a_peer_cannot_do_is_said_in_one_line():
    with peers.Peer(1, dict(os.environ)) as worker:
        load = peer_worker.Load(engine="nothing", weights="", dtype="float32", n_threads=1, capacity=1)
        with pytest.raises(peers.PeerFailed, match=r"^KeyError: 'nothing'$"):
            worker.ask(load)


def test_a_peer_that_dies_is_told_by_its_exit_code():
    with peers.Peer(1, dict(os.environ)) as worker:
        worker._process.kill()
        with pytest.raises(peers.PeerFailed, match="exit code -9"):
            worker.ask(peer_worker.Generate(prompt=[1], n_gen=1, absent=0))


def test_a_line_of_the_table_divides_by_compiled_in_the_same_rounds():
    slow = [(20.0 * drift, 6.0 * drift) for drift in (1.0, 1.5, 2.0, 3.0, 2.5, 1.2)]
    fast = [(ttft / 2, tpot / 3) for ttft, tpot in slow]
    competitors = [
        peers.Competitor("compiled", lambda: (0, 0), "same", lambda: 0, fast),
        peers.Competitor("llama.cpp", lambda: (0, 0), "same", lambda: 0, slow),
    ]
    own, other = peers.rows("float32", competitors)
    assert own == "| float32 | compiled | same | 17.5 | - | 3.5 | - |"
    assert re.findall(r"(\d\.\d\d) \[(\S+)-(\S+)\]", other) == [("2.00", "2.00", "2.00"), ("3.00", "3.00", "3.00")]


def test_where_tokens_part():
    assert peers.parting([1, 2, 9, 4], [1, 2, 3, 4]) == "2 of 4 same, then others"
    assert peers.parting([1, 2], [1, 2, 3, 4]) == "2 of 4 same, then others"
