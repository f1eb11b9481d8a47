"""The matrix of architectures: what its committed table must say, and a sample of it."""

from __future__ import annotations

import itertools
import time
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest
import torch

from kvcache.proof.tokens import _draft
from kvcache.strategies.cached import Dynamic
from tests.studies.architecture_causes import (
    CAUSES,
    FAILS,
    NOT_BUILT,
    OWN_TOKENS,
    ROUNDING,
    SEVERAL,
    STOPPED,
    UNEXPLAINED,
    Cause,
)
from tests.studies.architecture_cell import BATCH_PADDED, BATCH_SIZES, CHUNKED, GENERATED, Cell, Outcome, is_whole
from tests.studies.architecture_cells import DTYPES, cells, cells_of_bytes
from tests.studies.architecture_configs import TYPES, shrunken
from tests.studies.architecture_errors import Slow, is_own, limited, line
from tests.studies.architecture_figures import figures, lists, odd, of_bytes, readme_line
from tests.studies.architecture_rules import STOP, cause_of, with_causes
from tests.studies.architectures import BYTES, TABLE, lacking, merged, with_bytes
from tests.studies.architectures_page import PAGE, page
from tests.tiny import ARCHITECTURES, EVERYWHERE, token_ids

README = Path(__file__).resolve().parents[2] / "README.md"
WHOLE = {
    *itertools.product(BATCH_SIZES, EVERYWHERE, GENERATED, [""]),
    *itertools.product(BATCH_SIZES, CHUNKED, ["chunks"], [""]),
    *itertools.product([BATCH_PADDED], EVERYWHERE, ["padding"], [""]),
}
"""Every cell of a type and dtype."""


@pytest.fixture(scope="module")
def stored() -> pd.DataFrame:
    return pd.read_csv(TABLE, keep_default_na=False)


def test_no_cell_is_wrong_without_saying_so(stored: pd.DataFrame) -> None:
    assert "silent" not in set(stored["outcome"])


def test_every_cell_that_is_not_right_has_its_cause_by_todays_rules(stored: pd.DataFrame) -> None:
    assert not stored["cause"].isin([UNEXPLAINED.key, STOPPED.key]).any()
    again = with_causes(stored)
    pd.testing.assert_frame_equal(stored[["cause", "whose"]], again[["cause", "whose"]], check_dtype=False)
    assert set(stored["cause"]) - {""} == {cause.key for cause in CAUSES} - {UNEXPLAINED.key, STOPPED.key}


def test_every_cell_says_its_versions_and_at_most_two_digits(stored: pd.DataFrame) -> None:
    assert (stored["transformers"].astype(str) != "").all()
    assert (stored["torch"].astype(str) != "").all()
    shares = pd.concat([stored["logits_error"], stored["rounding_error"]])
    assert all(float(f"{float(share):.2g}") == float(share) for share in shares if share != "")


def test_every_type_that_could_be_built_has_every_cell_in_both_dtypes(stored: pd.DataFrame) -> None:
    assert lacking(stored, TYPES, list(DTYPES)) == {}
    assert set(stored["model_type"]) == set(TYPES)


def test_one_cell_that_is_missing_makes_a_type_lacking() -> None:
    assert is_whole(WHOLE)
    for cell in WHOLE:
        assert not is_whole(WHOLE - {cell})
    refused = {(1, "static", "whole", "it has no such layer")}
    assert is_whole((WHOLE - {(1, "static", "whole", ""), (1, "static", "chunks", "")}) | refused)


def test_every_type_is_in_one_list_of_the_page(stored: pd.DataFrame) -> None:
    of_types = lists(stored)
    assert sorted(itertools.chain(*of_types.values())) == sorted(TYPES)
    rows = {row.split("|")[1].strip() for row in PAGE.read_text(encoding="utf-8").splitlines() if row[:2] == "| "}
    assert rows - {"type"} == set(of_types["odd"])


def test_page_and_readme_are_those_of_the_table(stored: pd.DataFrame) -> None:
    assert PAGE.read_text(encoding="utf-8") == page(stored)
    assert " ".join(readme_line(figures(stored)).split()) in " ".join(README.read_text(encoding="utf-8").split())


def test_a_type_counts_as_right_only_where_it_is_at_both_batch_sizes() -> None:
    def of(outcome: Outcome, strategy: str) -> pd.DataFrame:
        found = [
            Cell(
                "rwkv", "float32", batch_size, name, "whole", "right" if name == "naive" or batch_size == 1 else outcome
            )  # type: ignore[arg-type]
            for batch_size in (1, 3)
            for name in ("naive", strategy)
        ]
        return pd.DataFrame([asdict(cell) for cell in found])

    assert figures(of("false", "hf-generate")).right == 0
    assert (figures(of("tie", "hf-generate")).right, figures(of("tie", "hf-generate")).by_generate_alone) == (1, 1)
    assert (figures(of("right", "static")).right, figures(of("right", "static")).by_generate_alone) == (1, 0)


@pytest.mark.parametrize(("dtype", "cause"), [("float32", UNEXPLAINED), ("bfloat16", ROUNDING)])
def test_only_a_narrow_dtype_explains_other_logits_and_only_those_it_makes_itself(dtype: str, cause: Cause) -> None:
    cell = asdict(Cell("llama", dtype, 1, "dynamic", "whole", "false", 0.06, True, rounding_error=0.05))
    assert cause_of(cell, right_in_float32=True) == cause
    assert cause_of({**cell, "logits_error": 0.2}, right_in_float32=True) == UNEXPLAINED
    assert cause_of(cell, right_in_float32=False) == UNEXPLAINED


def test_a_known_type_explains_only_what_its_cause_does() -> None:
    cell = asdict(Cell("mamba", "float32", 1, "dynamic", "context", "false", 0.3, prefix_stable=True))
    assert cause_of(cell) == SEVERAL
    assert cause_of({**cell, "scenario": "whole"}) == UNEXPLAINED
    assert cause_of({**cell, "outcome": "failed", "reason": "RuntimeError: of kvcache"}) == UNEXPLAINED
    assert cause_of({**cell, "outcome": "failed", "reason": "RuntimeError: x (transformers, a.py, f)"}) == FAILS
    refused = {**cell, "outcome": "refused", "reason": "a forward of it fails in transformers (a.py, line 1): x"}
    assert cause_of(refused) == FAILS
    assert cause_of({**refused, "model_type": "cpmant"}) == OWN_TOKENS
    assert cause_of({**refused, "reason": "another"}) == UNEXPLAINED
    nothing = asdict(Cell("mamba", "float32", 0, "", "", "refused", reason="ImportError: timm"))
    assert cause_of(nothing) == NOT_BUILT
    assert cause_of({**nothing, "outcome": "failed", "reason": f"{STOP}: it ended with -9"}) == STOPPED


def test_new_cells_take_the_place_of_their_own_dtype_alone() -> None:
    old = [Cell(each, "float32", 1, "naive", "whole", "right") for each in ("gpt2", "llama")]
    stored = pd.DataFrame([asdict(cell) for cell in [*old, Cell("moshi", "float32", 0, "", "", "refused")]])
    assert lacking(stored, ["gpt2", "moshi", "opt"], ["float32"]) == {"gpt2": ["float32"], "opt": ["float32"]}
    for _ in range(2):
        stored = merged(stored, "gpt2", ["bfloat16"], [Cell("gpt2", "bfloat16", 1, "naive", "whole", "tie", 0.0123)])
    assert list(zip(stored["model_type"], stored["dtype"], stored["outcome"], stored["logits_error"], strict=True))[
        1:3
    ] == [
        ("gpt2", "bfloat16", "tie", 0.012),
        ("llama", "float32", "right", None),
    ]
    counted = Cell("gpt2", "bfloat16", 1, "naive", "whole", "right", kv_bytes_measured=8, kv_bytes_predicted=8)
    filled = with_bytes(stored, [counted, Cell("opt", "float32", 1, "naive", "whole", "right")])
    assert list(filled["outcome"]) == list(stored["outcome"])
    assert filled.loc[filled["dtype"] == "bfloat16", "kv_bytes_measured"].tolist() == [8]
    as_read = with_bytes(stored.astype(dict.fromkeys(BYTES, "str")), [counted])
    assert as_read.loc[as_read["dtype"] == "bfloat16", "kv_bytes_measured"].tolist() == [8]


@pytest.mark.parametrize(("model_type", "outcomes"), [("llama", {"right"}), ("gpt_neo", {"right", "refused"})])
def test_a_sample(model_type: str, outcomes: set[str]) -> None:
    with torch.compiler.set_stance("force_eager"):
        found = list(cells(model_type, ["float32"]))
    assert {cell.outcome for cell in found if cell.strategy != "compiled"} == outcomes
    assert {cell.scenario for cell in found} == {"whole", "context", "chunks", "padding"}
    assert is_whole({(cell.batch_size, cell.strategy, cell.scenario, cell.reason) for cell in found})


def test_bytes_of_a_sample_are_as_predicted() -> None:
    rows = pd.DataFrame([asdict(cell) for cell in cells_of_bytes("mistral")])
    assert len(of_bytes(rows)) == 4
    assert of_bytes(rows)["within"].all()


def test_every_family_of_the_rope_switch_crosses_it() -> None:
    for model_type in ("phi3", "phimoe", "phi4_multimodal"):
        model, ids = shrunken(model_type), token_ids(1, 1, 16)
        before, beyond = model(ids[:, :14]).logits, model(ids).logits[:, :14]
        assert (before - beyond).abs().max() > 0.1 * before.abs().max()


def test_a_limit_ends_code_that_catches_every_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    def working(*_: object) -> None:
        while True:
            time.process_time()

    monkeypatch.setattr(Dynamic, "prepare", working)
    with pytest.raises(Slow, match="no end within"), limited(0.05):
        _draft(ARCHITECTURES["llama"](), token_ids(1, 1, 4), 2)


def test_only_kvcaches_own_errors_are_refusals() -> None:
    with pytest.raises(ValueError, match="invalid literal") as foreign:
        int("no number")
    assert not is_own(foreign.value)
    strategy = Dynamic(ARCHITECTURES["llama"]())
    strategy.prepare(1, 8)
    with pytest.raises(ValueError, match="attention_mask has shape") as own:
        strategy.prefill(token_ids(1, 1, 4), token_ids(1, 2, 4))
    assert is_own(own.value)
    assert line(own.value) == str(own.value)
    with pytest.raises((TypeError, AttributeError)) as of_transformers:
        ARCHITECTURES["llama"]()("no tensor")
    assert "(transformers, modeling_llama.py, " in line(of_transformers.value)


def test_what_compiled_does_not_take_is_no_row_of_the_page(stored: pd.DataFrame) -> None:
    of_compiled = odd(stored)[odd(stored)["strategy"] == "compiled"]
    assert set(of_compiled["outcome"]) <= {"false", "failed"}
