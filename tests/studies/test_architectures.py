"""The matrix of architectures: what its committed table must say, and a sample of it."""

from dataclasses import asdict

import pandas as pd
import pytest
import torch

from tests.studies.architecture_causes import ROUNDING, UNEXPLAINED, Cause, cause_of
from tests.studies.architecture_cells import DTYPES, Cell, cells
from tests.studies.architecture_configs import TYPES
from tests.studies.architectures import TABLE, lacking, merged
from tests.studies.architectures_page import explained


@pytest.fixture(scope="module")
def stored() -> pd.DataFrame:
    return pd.read_csv(TABLE, keep_default_na=False)


def test_no_cell_is_wrong_without_saying_so(stored: pd.DataFrame) -> None:
    assert "silent" not in set(stored["outcome"])


def test_every_cell_that_is_not_right_has_its_cause(stored: pd.DataFrame) -> None:
    odd = explained(stored)
    assert not (odd["cause"] == UNEXPLAINED).any()


@pytest.mark.parametrize(("dtype", "cause"), [("float32", UNEXPLAINED), ("bfloat16", ROUNDING)])
def test_only_a_narrow_dtype_explains_other_logits_and_only_those_it_makes_itself(dtype: str, cause: Cause) -> None:
    cell = asdict(Cell("llama", dtype, 1, "dynamic", "whole", "false", 0.06, True, rounding_error=0.05))
    assert cause_of(cell, right_in_float32=True) == cause
    assert cause_of({**cell, "logits_error": 0.2}, right_in_float32=True) == UNEXPLAINED
    assert cause_of(cell, right_in_float32=False) == UNEXPLAINED


def test_new_cells_take_the_place_of_their_own_dtype_alone() -> None:
    old = [Cell(each, "float32", 1, "naive", "whole", "right") for each in ("gpt2", "llama")]
    stored = pd.DataFrame([asdict(cell) for cell in [*old, Cell("moshi", "float32", 0, "", "", "refused")]])
    assert lacking(stored, ["gpt2", "moshi", "opt"], ["float32", "bfloat16"]) == {
        "gpt2": ["bfloat16"],
        "opt": ["float32", "bfloat16"],
    }
    for _ in range(2):
        stored = merged(stored, "gpt2", ["bfloat16"], [Cell("gpt2", "bfloat16", 1, "naive", "whole", "tie")])
    assert list(zip(stored["model_type"], stored["dtype"], stored["outcome"], strict=True)) == [
        ("gpt2", "float32", "right"),
        ("gpt2", "bfloat16", "tie"),
        ("llama", "float32", "right"),
        ("moshi", "float32", "refused"),
    ]


@pytest.mark.parametrize(("model_type", "outcomes"), [("llama", {"right"}), ("gpt_neo", {"right", "refused"})])
def test_a_sample(model_type: str, outcomes: set[str]) -> None:
    with torch.compiler.set_stance("force_eager"):
        found = list(cells(model_type, ["float32"]))
    assert {cell.outcome for cell in found if cell.strategy != "compiled"} == outcomes
    assert {cell.scenario for cell in found} == {"whole", "context", "chunks", "padding"}


def test_every_type_that_could_be_built_was_tried_in_both_dtypes(stored: pd.DataFrame) -> None:
    assert lacking(stored, TYPES, list(DTYPES)) == {}
