# ruff: noqa: E501  what tables look like stands here as it is printed
import io
import json
import re
from typing import get_args

import msgspec
import pandas as pd
import pytest
from rich.console import Console

from bench.analysis import columns, slopes
from bench.analysis import summary as summaries
from bench.analysis.cautions import Caution
from bench.analysis.tidy import Tidy
from bench.manifest import Ceiling
from bench.naming import namer
from bench.tell import environment, notes, tables
from bench.tell.formats import Format
from bench.tell.report import Report, document
from bench.tell.words import case_labels
from tests.handmade import ENVIRONMENT, fail, grid, make_case, make_run, run_with_lossy_kinds


def simple_ms(case, step):
    """Round figures: a cached step takes 40 ms, everything else a millisecond a token and 100 more."""
    return 40.0 if step and case.strategy != "naive" else 100.0 + case.n_prompt + step


def run_of(cases, **arguments):
    return make_run(cases, ms=simple_ms, turn_noise=0, step_noise=0, **arguments)


def summarize(run):
    return summaries.summarize(Tidy.of(run))


CASES = grid(["naive", "dynamic", "static"], [32, 2048], n_gen=16)
SUMMARY = summarize(run_of(CASES, failures=[fail(CASES[-1])], tokens_match={CASES[1].key: "tie"}))

MARKDOWN = """\
smollm2-135m, float32, cpu, 2 threads, sdpa, batch 1, 16 new tokens

|   prompt | strategy   |          TTFT ms |          TPOT ms |   prefill tok/s |   decode tok/s |   decode speed-up | tokens match   |
|---------:|:-----------|-----------------:|-----------------:|----------------:|---------------:|------------------:|:---------------|
|       32 | naive      |    132 [132-132] |    140 [140-140] |             242 |           7.14 |                 1 | true           |
|       32 | dynamic    |    132 [132-132] | 40.0 [40.0-40.0] |             242 |           25.0 |  3.50 [3.50-3.50] | tie            |
|       32 | static     |    132 [132-132] | 40.0 [40.0-40.0] |             242 |           25.0 |  3.50 [3.50-3.50] | true           |
|     2048 | naive      | 2148 [2148-2148] | 2156 [2156-2156] |             953 |          0.464 |                 1 | true           |
|     2048 | dynamic    | 2148 [2148-2148] | 40.0 [40.0-40.0] |             953 |           25.0 |  53.9 [53.9-53.9] | true           |
|     2048 | static     |                - |                - |               - |              - |                 - | oom            |

- static, prompt 2048: oom: not enough memory
"""

TERMINAL = """\
smollm2-135m, float32, cpu, 2 threads, sdpa, batch 1, 16 new tokens
                                                      prefill  decode            decode  tokens
prompt  strategy           TTFT ms           TPOT ms    tok/s   tok/s          speed-up  match
───────────────────────────────────────────────────────────────────────────────────────────────
    32  naive        132 [132-132]     140 [140-140]      242    7.14                 1  true
    32  dynamic      132 [132-132]  40.0 [40.0-40.0]      242    25.0  3.50 [3.50-3.50]  tie
    32  static       132 [132-132]  40.0 [40.0-40.0]      242    25.0  3.50 [3.50-3.50]  true

  2048  naive     2148 [2148-2148]  2156 [2156-2156]      953   0.464                 1  true
  2048  dynamic   2148 [2148-2148]  40.0 [40.0-40.0]      953    25.0  53.9 [53.9-53.9]  true
  2048  static                   -                 -        -       -                 -  oom

- static, prompt 2048: oom: not enough memory
"""


def test_the_table_of_a_run_in_markdown():
    assert tables.render(SUMMARY, "md") == MARKDOWN


def printed(renderable, width=100):
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    lines = console.file.getvalue().splitlines()
    return "".join(f"{line.rstrip()}\n" for line in lines)


def test_the_table_of_a_run_in_a_terminal():
    assert printed(tables.terminal(SUMMARY)) == TERMINAL


def test_names_are_text_and_no_markup_of_a_terminal():
    cases = grid(["naive", "cache:key:make"], [32], model="./m[/b] :key:", n_gen=16)
    text = printed(tables.terminal(summarize(run_of(cases))))
    assert text.startswith("./m[/b] :key:, float32")
    assert "cache:key:make" in text


def test_each_case_against_the_yardstick():
    """Only where generate() was measured or roofs were; a case that failed has no line."""
    cases = grid(["naive", "compiled", "hf-generate", "static"], [32], n_gen=16)
    text = tables.markdown(summarize(run_of(cases, failures=[fail(cases[-1])])))
    title = "Against hf-generate and the machine's roofs: smollm2-135m, float32, cpu, 2 threads, sdpa, batch 1"
    lines = text.split(title)[1].splitlines()[4:]
    assert [[cell.strip() for cell in line.split("|")[2:6]] for line in lines] == [
        ["naive", "1.00 [1.00-1.00]", "-", "0.286 [0.286-0.286]"],
        ["compiled", "1.00 [1.00-1.00]", "-", "1.00 [1.00-1.00]"],
        ["hf-generate", "1", "-", "1"],
    ]
    assert "hf-generate" not in MARKDOWN


@pytest.mark.parametrize("n_prompt", [2048, 8192])
def test_five_strategies_fit_100_columns(n_prompt):
    """Where the figures are too long, an interval goes below its figure and nothing is cut."""
    cases = grid(["naive", "dynamic", "static", "compiled", "hf-generate"], [128, n_prompt])
    text = printed(tables.terminal(summarize(make_run(cases, turn_noise=0.02))))
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    roofs = 6 + 5 + 1 + 5
    assert len(text.splitlines()) == (4 + 5 + 1 + 5 if n_prompt == 2048 else 4 + 5 + 1 + 10) + roofs


def test_settings_have_tables_of_their_own_and_depth_stands_by_the_prompt():
    cases = [make_case(n_depth=512), make_case(n_gen=1), make_case(dtype="bfloat16", device="cuda", batch_size=4)]
    text = tables.markdown(summarize(run_of(cases)))
    assert [line for line in text.splitlines() if line and not line.startswith("|")] == [
        "smollm2-135m, float32, cpu, 2 threads, sdpa, batch 1, 32 new tokens",
        "smollm2-135m, float32, cpu, 2 threads, sdpa, batch 1, 1 new token",
        "smollm2-135m, bfloat16, cuda, sdpa, batch 4, 32 new tokens",
    ]
    assert "| 128 @ 512 | dynamic " in text
    (alone,) = [line for line in text.split("1 new token\n")[1].splitlines() if "dynamic" in line][:1]
    assert [cell.strip() for cell in alone.split("|")[4:8]] == ["-", "561", "-", "-"]


def test_a_prompt_that_attended_to_quantized_keys_is_named_in_the_title():
    cases = [make_case("compiled"), make_case("compiled-int8", prefill_quantized=True)]
    assert tables.markdown(summarize(run_of(cases))).splitlines()[0] == (
        "smollm2-135m, float32, cpu, 2 threads, sdpa, batch 1, 32 new tokens, prefill quantized"
    )


@pytest.mark.parametrize(("n_prompts", "is_shown"), [([1], False), ([1, 128], True)])
def test_time_to_first_token_stands_in_the_table_of_caches_if_there_are_prompts(n_prompts, is_shown):
    """One token after a context is a step."""
    cases = [make_case(kind, n_prompt, n_depth=512) for n_prompt in n_prompts for kind in ("dynamic", "fp8")]
    run = run_of(cases)
    checks = [msgspec.structs.replace(check, kv_bytes_allocated_after_decode=7_000_000) for check in run.checks]
    summary = summarize(msgspec.structs.replace(run, checks=checks))
    assert ("TTFT / exact" in tables.caches_markdown(summary)) == is_shown
    assert "TPOT / exact" in tables.caches_markdown(summary)


def test_other_tokens_are_shown_as_such():
    run = run_of([make_case()], tokens_match={make_case().key: "false"})
    text = tables.markdown(summarize(run))
    assert text.splitlines()[4].endswith("| false          |")
    assert text.endswith("- dynamic, prompt 128: failed: emitted other tokens\n")


def test_a_lossy_case_that_ran_out_of_memory_says_so_though_its_tokens_differ():
    case = make_case("fp8")
    run = run_of([case], failures=[fail(case, process=1)], tokens_match={case.key: "false"}, processes=2)
    assert tables.markdown(summarize(run)).splitlines()[4].rstrip("| ").endswith("oom")


def test_a_case_without_a_cache_has_no_line_among_the_caches():
    run = run_with_lossy_kinds(["naive", "dynamic", "fp8", "cache:mine:make"])
    document = tables.render(summaries.summarize(Tidy.of(run)), "md")
    table = document[document.index("Caches compared with dynamic") :].split("\n\n")[1]
    assert [line.split("|")[2].strip() for line in table.splitlines()[2:5]] == ["dynamic", "fp8", "cache:mine:make"]


def test_csv_has_every_column_and_nothing_in_an_empty_cell():
    back = pd.read_csv(io.StringIO(tables.render(SUMMARY, "csv")), dtype={"tokens_match": "string"})
    assert list(back.columns) == columns.NAMES
    assert back["latency_ms"].to_list()[:-2] == SUMMARY["latency_ms"].to_list()[:-2]  # every digit
    assert back["latency_ms"].isna().sum() == 2
    assert tables.render(SUMMARY, "csv").splitlines()[-1] == (
        "smollm2-135m,static,decode,cpu,float32,sdpa,2,1,2048,16,0,,,,,,,,,45,1500,0.03,30,15,,,,,15,15,16504,,,,,,oom,not enough memory,,,,,,,,,true,,,,,,,,,,,,,,,,,0,bench-1,"
    )


def test_json_and_jsonl_hold_the_same_records_with_null_in_an_empty_cell():
    records = json.loads(tables.render(SUMMARY, "json"))
    lines = tables.render(SUMMARY, "jsonl").splitlines()
    assert [json.loads(line) for line in lines] == records
    assert list(records[0]) == columns.NAMES
    assert records[0]["latency_ms"] == 132.0
    assert records[0]["n_prompt"] == 32
    assert records[-1]["latency_ms"] is None
    assert records[-1]["mfu"] is None
    assert records[-1]["error"] == "not enough memory"


@pytest.mark.parametrize("form", get_args(Format))
def test_every_format_ends_with_one_line_end(form):
    text = tables.render(SUMMARY, form)
    assert text.endswith("\n")
    assert not text.endswith("\n\n")


def test_the_environment():
    assert environment.render(ENVIRONMENT, "md").splitlines()[:4] == [
        "| field                | value         |",
        "|:---------------------|:--------------|",
        "| hostname             | bench-1       |",
        "| os                   | Linux 6.8     |",
    ]
    assert "| gpu                  | -             |" in environment.render(ENVIRONMENT, "md")
    assert json.loads(environment.render(ENVIRONMENT, "json"))["cores"] == 2


def test_the_ceilings_of_an_environment():
    found = [
        Ceiling(ceiling=name, device="cpu", dtype=dtype, n_threads=2, kernel=kernel, per_s=per_s)
        for name, dtype, kernel, per_s in (
            ("read_bandwidth", "float32", "dot", 41.26e9),
            ("gemm", "float32", "mm 512x1024x1024", 0.41e12),
            ("read_bandwidth", "bfloat16", "sum", 40e9),
        )
    ]
    assert environment.render(ENVIRONMENT, "md", found).splitlines()[-4:] == [
        "| device   | dtype    |   threads |   read GB/s | by   |   GEMM TFLOP/s | by               |",
        "|:---------|:---------|----------:|------------:|:-----|---------------:|:-----------------|",
        "| cpu      | float32  |         2 |        41.3 | dot  |          0.410 | mm 512x1024x1024 |",
        "| cpu      | bfloat16 |         2 |        40.0 | sum  |              - | -                |",
    ]
    assert json.loads(environment.render(ENVIRONMENT, "json", found))["ceilings"][0]["per_s"] == 41.26e9
    sized = [msgspec.structs.replace(found[0], read_bytes=536_870_912)]
    assert "| 41.3 | dot of 536.9 MB |" in " ".join(environment.render(ENVIRONMENT, "md", sized).split())
    assert "ceilings" not in json.loads(environment.render(ENVIRONMENT, "json"))


def test_slopes_are_said_to_differ_from_zero_or_not():
    straight = run_of(grid(["naive", "dynamic"], [32, 512]))
    text = notes.slope_lines(slopes.slopes(Tidy.of(straight).steps))
    assert text == (
        "Latency of a decode step against the position of its token "
        "(smollm2-135m, float32, cpu, 2 threads, sdpa, batch 1):\n\n"
        "- naive: 1000 [1000-1000] ms per 1,000 tokens at position 528 of a curve over positions 34 to 528, significantly different from zero\n"
        "- dynamic: 0 [0-0] ms per 1,000 tokens over positions 33 to 543, not significantly different from zero\n"
    )
    few = notes.slope_lines(slopes.slopes(Tidy.of(run_of([make_case()], rounds=3)).steps))
    assert few.endswith(
        "- dynamic: 0 ms per 1,000 tokens over positions 129 to 159, without an interval: too few rounds\n"
    )


def test_a_slope_of_too_few_positions_is_not_told():
    text = notes.slope_lines(slopes.slopes(Tidy.of(run_of([make_case(n_gen=4)])).steps))
    assert text.endswith("\n- dynamic: too few positions for a slope (129 to 131)\n")


def test_how_to_read_the_figures_is_said_where_it_applies():
    pairs, few = "pairs the turns of the same round", "fewer than six rounds"
    lines = [
        notes.reading_line(summarize(run_of(cases, rounds=n_rounds)))
        for cases, n_rounds in ((CASES, 6), (CASES, 5), (grid(["dynamic"], [32]), 5), (grid(["naive"], [32]), 6))
    ]
    assert [(pairs in line, few in line) for line in lines] == [
        (True, False),
        (True, True),
        (False, True),
        (False, False),
    ]
    assert [line.count("\n") for line in lines] == [1, 1, 1, 1]
    assert lines[3] == "No MFU and MBU: the run measured no ceilings (--no-ceilings, or they failed at its start).\n"


def test_cautions_of_many_cases_share_a_line():
    labels = {"x": "naive, prompt 8", "y": "dynamic, prompt 8", "z": "static, prompt 8"}
    alone = Caution(case=None, text="one process", advice="measure more")
    repeated = [Caution(case=name, text="few rounds", advice="repeat") for name in labels]
    assert notes.caution_lines([alone, *repeated[:2]], labels) == (
        "- one process. Measure more.\n- naive, prompt 8; dynamic, prompt 8: few rounds. Repeat.\n"
    )
    assert notes.caution_lines(repeated, labels) == "- naive, prompt 8 and 2 other cases: few rounds. Repeat.\n"
    assert notes.caution_lines([], labels) == ""


def test_a_case_has_the_same_label_in_the_table_and_in_every_note():
    cases = [make_case("dynamic", 8), make_case("dynamic", 8, dtype="bfloat16", batch_size=4, n_depth=16)]
    report = Report.of(run_of(cases, rounds=4, failures=[fail(cases[1])]))
    assert list(case_labels(report.summary).values()) == [
        "dynamic, prompt 8, float32, batch 1",
        "dynamic, prompt 8 @ 16, bfloat16, batch 4",
    ]
    assert "\n- dynamic, prompt 8 @ 16, bfloat16, batch 4: oom: not enough memory\n" in document(report)
    assert "\n- dynamic, prompt 8, float32, batch 1: no interval: six undisturbed" in document(report)


def test_a_quantized_prefill_is_in_the_label_as_in_progress():
    cases = [make_case("compiled", 8), make_case("compiled-int8", 8, prefill_quantized=True)]
    labels = case_labels(summarize(run_of(cases)))
    name = namer(cases)
    assert labels == {case.key: name(case) for case in cases}
    assert labels[cases[1].key] == "compiled-int8, prompt 8, prefill quantized"


def test_a_run_closes_with_what_the_cache_bought_and_what_the_fast_path_adds():
    def ms(case, step):
        return simple_ms(case, step) / (2 if case.strategy == "compiled" and step else 1)

    cases = grid(["naive", "dynamic", "compiled", "hf-generate"], [32, 2048], n_gen=16)
    report = Report.of(make_run(cases, ms=ms, turn_noise=0, step_noise=0))
    assert report.closing == (
        "Speed-up of decode, dynamic over naive re-feed: 3.50 [3.50-3.50] at prompt 32, 53.9 [53.9-53.9] at prompt 2048; "
        "compiled over dynamic: 2.00 [2.00-2.00] at prompt 32, 2.00 [2.00-2.00] at prompt 2048.\n"
    )
    assert document(report).endswith(report.closing)
    assert Report.of(run_of(grid(["dynamic"], [32]))).closing == ""
    many = Report.of(make_run(grid(["naive", "dynamic"], range(8, 168, 8), n_gen=4), rounds=1)).closing
    assert many.count(" at prompt ") == 8
    assert many.endswith(" at prompt 160 (8 of 20 lengths, evenly spread).\n")
    assert Report.of(run_of(grid(["naive"], [32]))).closing == ""


INTERVALS = re.compile(r"\[[^\]\s]*-[^\]\s]*\]")


@pytest.mark.parametrize("width", [40, 80, 100, 200])
def test_a_terminal_of_any_width_shows_every_figure_whole(width):
    """Also the upper bound of every interval: 80 columns cut each of them."""
    cases = grid(["naive", "dynamic", "static", "compiled", "hf-generate"], [128, 8192])
    summary = summarize(make_run(cases, turn_noise=0.02))
    drawn, whole = (printed(tables.terminal(summary), columns) for columns in (width, 200))
    assert max(map(len, drawn.splitlines())) <= width
    assert "…" not in drawn
    assert sorted(INTERVALS.findall(drawn)) == sorted(INTERVALS.findall(whole))
    assert len(INTERVALS.findall(whole)) == 10 * 2 + 8 + 2 * 8
    assert ("in every row: tokens match true" in drawn) == (width <= 80)


def test_tokens_that_differ_keep_their_column_on_a_narrow_terminal():
    drawn = printed(tables.terminal(SUMMARY), 80)
    assert "tie" in drawn
    assert "oom" in drawn
    assert max(map(len, drawn.splitlines())) <= 80
    assert sorted(INTERVALS.findall(drawn)) == sorted(INTERVALS.findall(TERMINAL))


def test_caches_have_a_table_of_their_own_where_one_is_lossy():
    assert "Caches" not in tables.render(SUMMARY, "md")
    document = tables.render(summaries.summarize(Tidy.of(run_with_lossy_kinds())), "md")
    table = document[document.index("Caches compared with dynamic") :]
    (line,) = [line for line in table.splitlines() if "fp8" in line and " 300 " in line][:1]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[1:4] == ["fp8", "0.0662", "0.250"]
    assert cells[6:] == ["2e-02", "1e-03", "0.500", "0.750", "3 of 32"]


@pytest.mark.parametrize("exact", [True, False])
def test_caches_have_a_table_too_where_none_was_judged(exact: bool):
    """A user's own that promises to be exact, and a lossy one of which the model could not be judged."""
    run = run_with_lossy_kinds(["naive", "dynamic", "cache:mine:make"] if exact else ["naive", "dynamic", "fp8"])
    checks = [msgspec.structs.replace(check, quality=None, exact=exact or check.exact) for check in run.checks]
    document = tables.render(summaries.summarize(Tidy.of(msgspec.structs.replace(run, checks=checks))), "md")
    table = document[document.index("Caches compared with dynamic") :]
    name = "cache:mine:make" if exact else "fp8"
    (line,) = [line for line in table.splitlines() if name in line and " 300 " in line][:1]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[1:4] == [name, "0.0662", "0.250"]
    assert cells[4].startswith("0.7")
    assert cells[6:] == ["-"] * 5


def test_memory_of_each_arm_has_a_table_where_it_is_known():
    assert "Memory" not in tables.render(SUMMARY, "md")
    run = run_with_lossy_kinds(["naive", "dynamic", "fp8"])
    checks = [
        msgspec.structs.replace(check, peak_beyond_weights_bytes=60_000_000 if " dynamic " in check.case else None)
        for check in run.checks
    ]
    plan = [msgspec.structs.replace(item, weights_bytes=538_000_000) for item in run.manifest.plan]
    run = msgspec.structs.replace(run, checks=checks, manifest=msgspec.structs.replace(run.manifest, plan=plan))
    summary = summaries.summarize(Tidy.of(run))
    document = tables.render(summary, "md")
    table = document[document.index("Memory, beside the weights' 538 MB: smollm2-135m, float32") :]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[4:]]
    assert lines == [["100", "dynamic", "0.105", "59.9", "60.0"], ["300", "dynamic", "0.265", "59.7", "60.0"]]
    assert "Memory, beside" in printed(tables.terminal(summary))
