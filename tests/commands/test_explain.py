"""The help says what the tables hold: the flags of a preset, read back, make that preset."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import msgspec
import pytest

from bench.case import PRESETS, Sweep
from bench.commands import explain, flags
from kvcache.models.random_weights import GEOMETRIES
from kvcache.strategies.catalogue import STRATEGIES

README = Path(__file__).resolve().parents[2] / "README.md"
SWEEPS = [sweep for sweeps in PRESETS.values() for sweep in sweeps]


def plain(text: str) -> str:
    return " ".join(text.split())


def parsed(shown: list[str]) -> Sweep:
    """The sweep that `kvbench run` makes of these flags."""
    given = dict(shlex.split(flag) for flag in shown)
    values = {name: given.get(flag) for name, flag in explain.FLAGS.items()}
    renamed = {"models": "model", "n_threads": "threads", "device": "device_name"}
    words = {renamed.get(name, name): value for name, value in values.items()}
    seed = words.pop("seed")
    (sweep,) = flags.sweeps("default", **words, seed=None if seed is None else int(seed))
    return msgspec.structs.replace(sweep, n_threads=())


def test_every_field_of_a_sweep_has_its_flag() -> None:
    assert set(explain.FLAGS) == set(Sweep.__struct_fields__)


@pytest.mark.parametrize("sweep", SWEEPS)
def test_the_flags_of_a_sweep_make_that_sweep(sweep: Sweep) -> None:
    assert parsed(explain.sweep_flags(sweep)) == sweep


def test_the_help_holds_every_preset_whole() -> None:
    told = plain(explain.presets())
    for name, sweeps in PRESETS.items():
        assert f"{name}: {plain(' '.join(' '.join(explain.sweep_flags(sweep)) for sweep in sweeps))}" in told


def test_the_default_shows_the_defaults_of_all_flags_but_two() -> None:
    shown = {flag.split()[0] for flag in explain.sweep_flags(Sweep())}
    assert set(explain.FLAGS.values()) - shown == {"-t", "--attn-implementation"}  # they depend on machine and model


def test_models_and_strategies_are_named() -> None:
    assert all(name in explain.models() for name in GEOMETRIES)
    assert all(f"{name}: " in explain.strategies() for name in STRATEGIES)


@pytest.mark.parametrize("sentence", [explain.CORRECTNESS, explain.LABEL])
def test_the_readme_says_it_in_the_same_words(sentence: str) -> None:
    assert sentence in plain(README.read_text())


def test_the_readme_names_every_exit_code() -> None:
    codes = README.read_text().partition("## Exit codes")[2].partition("\n## ")[0]
    assert {int(code) for code in re.findall(r"\b\d+\b", codes)} == {0, 1, 2, 3, 4, 5, 130, 143}
