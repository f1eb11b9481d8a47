"""The help says what the tables hold: the flags of a preset, read back, make that preset."""

import re
import shlex
from pathlib import Path
from typing import get_args

import msgspec
import pytest
import typer

from bench.case import PRESETS, Sweep
from bench.commands import flags, values
from kvcache.models.random_weights import GEOMETRIES
from kvcache.strategies.catalogue import STRATEGIES

README = Path(__file__).resolve().parents[2] / "README.md"
SWEEPS = [sweep for sweeps in PRESETS.values() for sweep in sweeps]


def plain(text: str) -> str:
    return " ".join(text.replace("\b", "").split())


def parsed(words: list[str]) -> Sweep:
    """The sweep that `kvbench run` makes of these flags."""
    given = dict(shlex.split(word) for word in words)
    grid = {}
    for flag in flags.GRID.values():
        if (text := given.pop(flag.names[0], None)) is not None:
            grid[flag.field] = flag.parse(text) if flag.many else int(text) if flag.value is int else text
    assert not given
    (sweep,) = flags.sweeps("default", grid)
    return msgspec.structs.replace(sweep, n_threads=())


def test_every_field_of_a_sweep_has_its_flag() -> None:
    assert set(flags.GRID) == set(Sweep.__struct_fields__)


@pytest.mark.parametrize("sweep", SWEEPS)
def test_the_flags_of_a_sweep_make_that_sweep(sweep: Sweep) -> None:
    assert parsed(flags.sweep_flags(sweep)) == sweep


def test_a_flag_that_takes_a_list_is_a_list_in_the_sweep() -> None:
    for field, value in msgspec.structs.asdict(Sweep()).items():
        assert flags.GRID[field].many == isinstance(value, tuple)


def test_the_help_holds_every_preset_whole() -> None:
    shown = plain(flags.below_the_flags())
    for name, sweeps in PRESETS.items():
        assert f"{name} {plain(' '.join(' '.join(flags.sweep_flags(sweep)) for sweep in sweeps))}" in shown


def test_the_default_shows_the_defaults_of_all_flags_but_three() -> None:
    shown = {flag.split()[0] for flag in flags.sweep_flags(Sweep())}
    # Two depend on machine and model, and a switch is off.
    assert {flag.names[0] for flag in flags.GRID.values()} - shown == {
        "-t",
        "--attn-implementation",
        "--prefill-quantized",
    }


def test_models_and_strategies_are_named() -> None:
    assert all(name in flags.GRID["models"].help for name in GEOMETRIES)
    assert all(f" {name} " in flags.below_the_flags() for name in STRATEGIES)


def test_no_line_of_a_block_is_wider_than_the_help() -> None:
    blocks = [block for block in flags.below_the_flags().split("\n\n") if block.startswith("\b")]
    assert max(len(line) for block in blocks for line in block.splitlines()) <= 78


@pytest.mark.parametrize("sentence", [flags.CORRECTNESS, flags.NAMING])
def test_the_readme_says_it_in_the_same_words(sentence: str) -> None:
    assert sentence in plain(README.read_text())


def test_the_readme_names_every_exit_code() -> None:
    codes = README.read_text().partition("## Exit codes")[2].partition("\n## ")[0]
    assert {int(code) for code in re.findall(r"\b\d+\b", codes)} == {0, 1, 2, 3, 4, 5, 130, 143}


@pytest.mark.parametrize(
    ("text", "says"),
    [("8,x", "x: not an integer"), ("0", "0: too small"), ("8,08", "8 is given twice"), ("8,,9", "an empty value")],
)
def test_a_list_of_integers_says_what_is_wrong_in_it(text: str, says: str) -> None:
    with pytest.raises(typer.BadParameter, match=says):
        values.integers(text, 1)
    assert values.integers("8, 9", 1) == (8, 9)


def test_an_unknown_word_is_answered_with_the_nearest() -> None:
    valid = get_args(flags.GRID["strategies"].value)
    assert values.unknown("dinamic", valid).startswith("dinamic: unknown; did you mean dynamic? (valid: naive, ")
    assert "did you mean" not in values.unknown("xyz", valid)
    assert "takes one value" in values.unknown("naive,dynamic", valid)
