# ruff: noqa: E501  what tables look like stands here as it is printed
import io
import itertools
import json
from typing import get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from bench.judge.verdict import Verdict, VerdictKind, exit_code
from bench.tell import verdicts
from tests.handmade import make_case

NAIVE, DYNAMIC = (make_case(strategy, 16, n_gen=8) for strategy in ("naive", "dynamic"))
KINDS = get_args(VerdictKind)


def make(kind, case=DYNAMIC, phase="decode", quantity="time", **fields):
    return Verdict(case=case, phase=phase, kind=kind, quantity=quantity, **fields)


SLOWER = make("regression", base=40.0, head=46.0, effect=0.15, low=0.11, high=0.19, detectable=0.04)
MORE = make("regression", NAIVE, "prefill", "lm_head_positions", base=1, head=16)
SAME = make("same", base=40.0, head=40.2, effect=0.005, low=-0.01, high=0.02, detectable=0.03)
EQUAL = make("same", quantity="forward_calls", base=7, head=7)
OTHER_MACHINE = make("not-comparable", NAIVE, detail="no session of this machine")

MARKDOWN = """\
### kvbench gate

REGRESSION: dynamic decode, prompt 16, time +15.0% [+11.0 to +19.0] (and 1 more); undo it, or accept it with `kvbench baseline promote`.

smollm2-135m, float32, cpu, 2 threads, sdpa, batch 1, 8 new tokens

| verdict    | case               | phase   | quantity          |   base |   head |                   change |   detectable |
|:-----------|:-------------------|:--------|:------------------|-------:|-------:|-------------------------:|------------------:|
| REGRESSION | dynamic, prompt 16 | decode  | time              |   40.0 |   46.0 | +15.0% [+11.0 to +19.0] |             +4.0% |
| REGRESSION | naive, prompt 16   | prefill | lm_head_positions |      1 |     16 |                      +15 |                 - |

- not comparable, naive decode, prompt 16, time: no session of this machine
- exact figures that are equal: 1
- times in ms; a change above zero is slower, and is paired by process, so it need not be head / base
"""


def test_the_page_of_a_pull_request():
    page = verdicts.markdown([EQUAL, MORE, OTHER_MACHINE, SLOWER], title="kvbench gate")
    assert page.replace("-", "").replace(" ", "") == MARKDOWN.replace("-", "").replace(" ", "")
    assert page.index("time") < page.index("lm_head_positions")


@pytest.mark.parametrize("first", [True, False])
def test_a_prompt_that_attended_to_quantized_keys_is_named_where_it_did(first):
    """In the title if all did, else in the names of those."""
    quantized = make_case("compiled-int8", 16, prefill_quantized=True)
    only = verdicts.table([make("regression", quantized)]).splitlines()
    assert only[0].endswith(", 32 new tokens, prefill quantized")
    assert "compiled-int8, prompt 16 " in only[4]
    both = [make("regression", case) for case in (quantized, make_case("compiled", 16))][:: 1 if first else -1]
    title, *rows = verdicts.table(both).splitlines()
    assert title.endswith(", 32 new tokens")
    assert sum("compiled-int8, prompt 16, prefill quantized " in row for row in rows) == 1
    assert sum("compiled, prompt 16 " in row for row in rows) == 1


def test_a_reason_that_several_share_is_told_once():
    page = verdicts.table([OTHER_MACHINE, msgspec.structs.replace(OTHER_MACHINE, phase="prefill"), MORE])
    assert "not comparable (2): no session of this machine" in page


def test_a_terminal_shows_the_same_rows():
    buffer = io.StringIO()
    Console(file=buffer, width=100, color_system=None).print(verdicts.terminal([EQUAL, MORE, SLOWER]))
    text = buffer.getvalue()
    assert "REGRESSION  dynamic, prompt 16  decode   time" in text
    assert "exact figures that are equal: 1" in text


def test_json_holds_every_verdict_worst_first():
    told = json.loads(verdicts.document([EQUAL, SAME, SLOWER], title="head against base"))
    assert told["title"] == "head against base"
    assert told["exit_code"] == 1
    assert [verdict["kind"] for verdict in told["verdicts"]] == ["regression", "same", "same"]
    assert told["verdicts"][0]["effect"] == 0.15
    assert told["verdicts"][1]["detail"] == ""


def test_less_work_is_not_called_faster():
    text = verdicts.table([make("faster", quantity="forward_calls", base=8, head=7)])
    assert "LESS WORK" in text
    assert "-1" in text


@pytest.mark.parametrize(
    ("kinds", "code"),
    [
        ([], 3),
        (["not-comparable"], 3),
        (["new"], 3),
        (["same", "new", "not-comparable"], 0),
        (["faster"], 0),
        (["inconclusive", "same"], 4),
        (["missing", "inconclusive", "same"], 3),
        (["regression", "missing", "inconclusive"], 1),
        (["failed", "regression", "missing"], 5),
    ],
)
def test_exit_codes(kinds, code):
    assert exit_code([make(kind) for kind in kinds]) == code


def test_a_reason_that_many_share_is_told_once():
    undecided = [make("inconclusive", case, effect=0.01, detail="undecided after 8") for case in (NAIVE, DYNAMIC)]
    text = verdicts.markdown(undecided, title="kvbench ab", command="ab")
    assert text.count("undecided after 8") == 1
    assert "- inconclusive (2): undecided after 8" in text


def test_required_times_must_be_compared():
    assert exit_code([EQUAL]) == 0
    assert exit_code([EQUAL], require_time=True) == 3
    assert exit_code([EQUAL, OTHER_MACHINE]) == 0
    assert exit_code([EQUAL, SAME, OTHER_MACHINE], require_time=True) == 3
    assert exit_code([EQUAL, SAME], require_time=True) == 0
    assert exit_code([MORE], require_time=True) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_every_sentence_says_what_to_do(kind):
    text = verdicts.sentence([make(kind, detail="why")])
    assert text.endswith(".")
    assert ";" in text


@pytest.mark.parametrize("kind", KINDS)
def test_an_ab_is_not_sent_to_a_baseline(kind):
    text = verdicts.sentence([make(kind)], command="ab")
    assert ";" in text
    assert "baseline" not in text
    assert "promote" not in text


def test_an_ab_that_was_interrupted_wants_no_longer_budget():
    undecided = [make("inconclusive")]
    assert "--budget" in verdicts.sentence(undecided, command="ab")
    assert "run it again" in verdicts.sentence(undecided, command="unfinished ab")
    assert "--budget" not in verdicts.sentence(undecided, command="unfinished ab")


def test_right_tokens_alone_compare_nothing():
    assert exit_code([make("same", quantity="tokens_match"), OTHER_MACHINE]) == 3


@given(st.lists(st.sampled_from(KINDS)), st.booleans())
def test_the_sentence_and_the_code_agree_whatever_the_order(kinds, require_time):
    found = [make(kind, quantity="time" if number % 2 else "forward_calls") for number, kind in enumerate(kinds)]
    code = exit_code(found, require_time=require_time)
    words = {5: "FAILED", 1: "REGRESSION", 3: "NOT COMPARABLE", 4: "INCONCLUSIVE", 0: ("PASSED", "Times NOT judged")}
    assert verdicts.sentence(found, require_time=require_time).startswith(words[code])
    assert code == exit_code(found[::-1], require_time=require_time)


def test_precedence_holds_for_every_pair_of_kinds():
    rank = {"failed": 5, "regression": 1, "missing": 3, "inconclusive": 4}
    order = [5, 1, 3, 4, 0]
    for one, other in itertools.combinations(KINDS, 2):
        code = exit_code([EQUAL, make(one), make(other)])
        assert code == min((rank.get(one, 0), rank.get(other, 0)), key=order.index)


@pytest.mark.parametrize("kind", ["missing", "new"])
def test_cases_that_one_side_lacks_for_one_reason_share_a_line(kind):
    text = verdicts.table([make(kind, case, quantity="tokens_match", detail="not there") for case in (NAIVE, DYNAMIC)])
    assert text.count("not there") == 1
    assert f"- {kind} (2): not there" in text
