"""A grid from a file: what it may hold, what wins, and one line for each mistake."""

import json
from pathlib import Path

import pytest

from tests.commandline import kvbench, refused

TINY = 'model = "random:tiny"\nthreads = 1\n'


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def cases(*arguments: str) -> list[dict]:
    return json.loads(kvbench("run", "--dry-run", "-o", "json", *arguments).stdout)


def test_a_file_holds_a_grid_and_settings() -> None:
    Path("ci.toml").write_text(TINY + 'n-prompt = [8, 16]\nn-gen = 4\nstrategies = "naive,dynamic"\nceilings = false\n')
    found = cases("--config", "ci.toml")
    assert {(case["n_prompt"], case["strategy"]) for case in found} == {
        (n_prompt, strategy) for n_prompt in (8, 16) for strategy in ("naive", "dynamic")
    }
    assert {case["n_gen"] for case in found} == {4}
    assert all(case["estimated_s"] > 0 for case in found)


def test_the_line_wins_over_the_file_the_file_over_pyproject_and_that_over_the_preset() -> None:
    Path("pyproject.toml").write_text(f"[tool.kvbench]\n{TINY}preset = 'smoke'\nn-prompt = [5]\nn-gen = 5\nseed = 5\n")
    Path("ci.toml").write_text("n-gen = 6\nseed = 6\n")
    (case,) = cases("--config", "ci.toml", "--seed", "7", "--strategies", "naive")
    assert (case["n_prompt"], case["n_gen"], case["seed"]) == (5, 6, 7)
    assert len(cases()) == 4  # the strategies of smoke


def test_rounds_come_from_the_file() -> None:
    Path("ci.toml").write_text(f"{TINY}n-prompt = 8\nrepetitions = 12\n")
    assert "12 rounds each" in kvbench("run", "--dry-run", "--config", "ci.toml").stdout


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("n_prompt = 8", "ci.toml: unknown key n_prompt; did you mean n-prompt?"),
        ("resume = 'x'", "ci.toml: unknown key resume"),
        ("repetitions = 'six'", "ci.toml: --repetitions six: give an integer of at least 1"),
        ("repetitions = 0", "ci.toml: --repetitions 0: give an integer of at least 1"),
        ("repetitions = true", "repetitions: give a value"),
        ("n-prompt = 1.5", "ci.toml: --n-prompt 1.5: not an integer"),
        ("n-prompt = []", "--n-prompt '': an empty value"),
        ("n-prompt = [[8]]", "n-prompt: give a string, a number, or a list"),
        ("n-prompt = {a = 1}", "n-prompt: give a string, a number, or a list"),
        ("device = ['cpu', 'cuda']", "ci.toml: --device cpu,cuda: takes one value"),
        ("strategies = 'dinamic'", "ci.toml: --strategies dinamic: unknown; did you mean dynamic?"),
        ("ceilings = 'no'", "ceilings: give true or false"),
        ("n-prompt = ", "--config ci.toml: not a TOML file"),
    ],
)
def test_a_mistake_in_a_file_is_one_line_that_names_it(text: str, says: str) -> None:
    Path("ci.toml").write_text(text)
    assert says in refused("run", "--config", "ci.toml", "--dry-run")


def test_an_unreadable_file_is_refused() -> None:
    assert "--config nothing.toml: cannot be read" in refused("run", "--config", "nothing.toml")
    Path("bytes.toml").write_bytes(b"\xff\xfe")
    assert "--config bytes.toml: not a TOML file" in refused("run", "--config", "bytes.toml")
    Path("pyproject.toml").write_text("[tool]\nkvbench = 3\n")
    assert "pyproject.toml: tool.kvbench: not a table" in refused("run")
    Path("pyproject.toml").write_text("[tool.kvbench]\nbudgets = 3\n")
    assert "pyproject.toml [tool.kvbench]: unknown key budgets; did you mean budget?" in refused("run")


def test_resume_takes_no_grid_from_a_file() -> None:
    Path("pyproject.toml").write_text("[tool.kvbench]\nn-prompt = 8\nout = 'mine'\n")
    assert "mine" in refused("run", "--resume", "x", code=3)
    assert "leave out --n-prompt, --repetitions" in refused("run", "--resume", "x", "-p", "8", "-r", "3")
