"""What other tools read: each document in the form that its reader publishes; and llama-bench's results, read."""

import json
import re
import resource
import sqlite3
from contextlib import closing

import msgspec
import pytest

from bench.analysis import columns, frames
from bench.analysis.cautions import cautions
from bench.analysis.summary import summarize
from bench.analysis.tidy import Tidy
from bench.errors import DataError, UsageError
from bench.judge.compare import compare
from bench.manifest import ELSEWHERE
from bench.store import duck, imported
from bench.store.llama_tests import read_tests
from bench.store.run_folder import read_run
from bench.tell.benchmark_json import benchmark_json
from bench.tell.exchange import EXPORTERS
from tests.handmade import grid, make_run

CASES = [*grid(["naive", "dynamic"], [128], n_gen=8), *grid(["dynamic"], [128], n_gen=8, batch_size=2)]
TIDY = Tidy.of(make_run(CASES))
SUMMARY = summarize(TIDY)
TIMED = {(row["case"], row["phase"]): row for row in SUMMARY.to_dict("records")}


def documents(form, tidy=TIDY, summary=SUMMARY):
    return EXPORTERS[form](tidy, summary)


class Metric(msgspec.Struct, forbid_unknown_fields=True):
    """https://bencher.dev/bmf.json: benchmark -> measure -> this. No registry has its command: not run here."""

    value: float
    lower_value: float | None = None
    upper_value: float | None = None


class Entry(msgspec.Struct, forbid_unknown_fields=True):
    """An entry of customSmallerIsBetter and customBiggerIsBetter, by github-action-benchmark's README.

    Its own reader (src/extract.ts) takes these fields by name. npm does not have the action, so it is not run here.
    """

    name: str
    unit: str
    value: float
    range: str | None = None
    extra: str | None = None


LLAMA_BENCH_FIELDS = [
    "build_commit",
    "build_number",
    "cpu_info",
    "gpu_info",
    "backends",
    "model_filename",
    "model_type",
    "model_size",
    "model_n_params",
    "n_batch",
    "n_ubatch",
    "n_threads",
    "cpu_mask",
    "cpu_strict",
    "poll",
    "type_k",
    "type_v",
    "n_gpu_layers",
    "split_mode",
    "main_gpu",
    "no_kv_offload",
    "flash_attn",
    "tensor_split",
    "tensor_buft_overrides",
    "use_mmap",
    "embeddings",
    "no_op_offload",
    "n_prompt",
    "n_gen",
    "n_depth",
    "test_time",
    "avg_ns",
    "stddev_ns",
    "avg_ts",
    "stddev_ts",
    "samples_ns",
    "samples_ts",
]
"""The columns of llama.cpp's scripts/compare-llama-bench.py (commit 05f3b204) in its order, which tables that
`llama-bench -o sql` makes have too, and the samples. No registry has llama.cpp's tools, so none of them is run here."""

LLAMA_BENCH_REQUIRED = set(LLAMA_BENCH_FIELDS) - {
    *("build_number", "model_size", "model_n_params", "no_op_offload"),
    *("avg_ns", "stddev_ns", "stddev_ts", "samples_ns", "samples_ts"),
}
"""Without one of these that script ends with `Missing required data key(s)`."""


def test_bencher_gets_ns_and_tokens_per_second_in_the_form_of_its_schema():
    (document,) = documents("bmf").values()
    found = msgspec.json.decode(document, type=dict[str, dict[str, Metric]])
    assert len(found) == len(TIMED)
    for (case, phase), row in TIMED.items():
        measures = found[f"{phase}[{case}]"]
        assert measures["latency"].value == pytest.approx(row["latency_ms"] * 1e6)
        assert measures["throughput"].value == row["tokens_per_s"]
        for metric in measures.values():
            assert metric.lower_value <= metric.value <= metric.upper_value


def test_a_figure_without_an_interval_has_no_bounds():
    tidy = Tidy.of(make_run(CASES[:1], rounds=3))
    (document,) = documents("bmf", tidy, summarize(tidy)).values()
    assert all(set(metric) == {"value"} for measures in json.loads(document).values() for metric in measures.values())


def test_the_github_action_gets_a_file_for_each_direction():
    made = documents("github-action-benchmark")
    assert list(made) == ["github-smaller-is-better.json", "github-bigger-is-better.json"]
    smaller, bigger = (msgspec.json.decode(document, type=list[Entry]) for document in made.values())
    assert {entry.unit for entry in smaller} == {"ms"}
    assert {entry.unit for entry in bigger} == {"tokens/s"}
    assert [entry.name for entry in smaller] == [entry.name for entry in bigger]
    assert [entry.value for entry in smaller] == [row["latency_ms"] for row in TIMED.values()]
    for entry in [*smaller, *bigger]:
        low, high = map(float, str(entry.range).split(" to "))
        assert 0.99 * low <= entry.value <= 1.01 * high


def test_llama_bench_rows_have_its_fields_and_a_decode_stands_at_the_depth_of_its_prompt():
    (document,) = documents("llama-bench").values()
    rows = [json.loads(line) for line in document.splitlines()]
    assert all(list(row) == LLAMA_BENCH_FIELDS for row in rows)
    assert all(row[name] is not None for row in rows for name in LLAMA_BENCH_REQUIRED)
    shapes = [(row["model_type"].split()[-1], row["n_prompt"], row["n_gen"], row["n_depth"]) for row in rows]
    assert shapes == [("naive", 128, 0, 0), ("naive", 0, 7, 128), ("dynamic", 128, 0, 0), ("dynamic", 0, 7, 128)]
    for row in rows:  # the batch of two is left out
        assert len(row["samples_ns"]) == len(row["samples_ts"]) == 6
        tokens = row["n_prompt"] + row["n_gen"]
        assert row["samples_ts"] == pytest.approx([tokens / time * 1e9 for time in row["samples_ns"]])
        assert min(row["samples_ns"]) <= row["avg_ns"] <= max(row["samples_ns"])


GO_LINE = re.compile(r"Benchmark[A-Z]\S*-\d+ 1 [\d.]+ ns/op [\d.e+]+ tok/s")
"""Of the format's proposal (golang/proposal 14313): name, iterations, then pairs of value and unit. Neither Debian nor
PyPI has benchstat, so it is not run here."""


def test_benchstat_gets_a_line_of_gos_format_for_each_turn():
    (document,) = documents("benchstat").values()
    settings, lines = [], []
    for line in document.decode().splitlines():
        (lines if line.startswith("Benchmark") else settings).append(line)
    assert len(lines) == len(TIMED) * 6
    assert all(GO_LINE.fullmatch(line) for line in lines)
    assert all(re.fullmatch(r"(Unit \S+ \S+=\S+)|([a-z]\S*: .*)", line) for line in settings)
    assert len({line.split()[0] for line in lines}) == len(TIMED)


def test_benchstat_compares_two_runs_of_one_machine_and_gets_no_line_from_its_name():
    """Its -table is .config by default (golang.org/x/perf/cmd/benchstat): a line that differs is a table of its own."""
    environment = msgspec.structs.replace(TIDY.run.manifest.environment, cpu_model="A\nBenchmarkEvil 1 5 ns/op")
    heads = []
    for path in ("runs/before", "runs/after"):
        run = msgspec.structs.replace(
            TIDY.run, path=path, manifest=msgspec.structs.replace(TIDY.run.manifest, environment=environment)
        )
        (document,) = documents("benchstat", Tidy.of(run)).values()
        heads.append([line for line in document.decode().splitlines() if not line.startswith("Benchmark")])
    assert heads[0] == heads[1]
    assert "cpu: A BenchmarkEvil 1 5 ns/op" in heads[0]


def test_parquet_holds_every_column_of_the_summary_with_its_type(tmp_path):
    duckdb = pytest.importorskip("duckdb")
    (document,) = documents("parquet").values()
    (tmp_path / "summary.parquet").write_bytes(document)
    found = duckdb.sql(f"SELECT * FROM '{tmp_path}/summary.parquet'")
    assert found.columns == columns.NAMES
    (latencies,) = zip(*duckdb.sql(f"SELECT latency_ms FROM '{tmp_path}/summary.parquet'").fetchall(), strict=True)
    assert list(latencies) == SUMMARY["latency_ms"].to_list()


# --- llama-bench's results as a run ----------------------------------------------------------------------------------

PP = {
    "build_commit": "8cf427ff",
    "cpu_info": "AMD Ryzen 7 7800X3D",
    "gpu_info": "",
    "backends": "CPU",
    "model_filename": "models/smollm2-135m-f16.gguf",
    "model_type": "llama 135M F16",
    "model_size": 270_000_000,
    "n_threads": 2,
    "n_prompt": 512,
    "n_gen": 0,
    "n_depth": 0,
    "test_time": "2026-04-24T11:58:50Z",
    "avg_ns": 72_000_000,
    "samples_ns": [70_000_000, 72_000_000, 74_000_000],
    "a field of next year": 1,
}
TG = PP | {"n_prompt": 0, "n_gen": 128, "n_depth": 512, "avg_ns": 128_000_000, "samples_ns": [128_000_000] * 6}


def store(tmp_path, *tests):
    tmp_path.mkdir(exist_ok=True)
    path = tmp_path / "llama.jsonl"
    path.write_text("".join(f"{json.dumps(test)}\n" for test in tests))
    folder, notes = imported.store(path, tmp_path / "runs", None)
    return Tidy.of(read_run(folder)), notes


def test_an_imported_test_is_a_case_with_its_times(tmp_path):
    tidy, notes = store(tmp_path, PP, TG)
    assert notes == []
    assert tidy.run.name == "20260424T115850Z-llama-bench"
    assert tidy.run.manifest.origin.tool == "llama-bench"
    assert tidy.unfinished == []
    rows = summarize(tidy).set_index(["n_prompt", "phase"])
    assert rows["latency_ms"].dropna().to_dict() == {(512, "prefill"): 72.0, (1, "decode"): 1.0}
    assert list(rows.index) == [(512, "prefill"), (1, "prefill"), (1, "decode")]
    assert rows["n_depth"].to_list() == [0, 512, 512]
    assert set(rows["strategy"]) == {"llama.cpp"}
    assert set(rows["dtype"]) == {"float16"}
    assert set(rows["machine"]) == {ELSEWHERE}
    assert rows["exact"].isna().all()
    assert rows.loc[(1, "decode"), "tokens_per_s"] == pytest.approx(1000)


def test_a_generation_of_one_token_is_a_prompt_of_one(tmp_path):
    """Both feed one token, at the same depth."""
    tidy, _ = store(tmp_path, TG | {"n_gen": 1, "avg_ns": 1_000_000, "samples_ns": []})
    rows = summarize(tidy).set_index(["n_prompt", "phase"])
    assert rows["latency_ms"].to_dict() == {(1, "prefill"): 1.0}
    (document,) = documents("llama-bench", tidy, summarize(tidy)).values()
    row = json.loads(document)
    assert (row["n_prompt"], row["n_gen"], row["n_depth"]) == (1, 0, 512)


def test_an_import_of_few_repetitions_has_one_caution_for_each_case(tmp_path):
    tidy, _ = store(tmp_path, PP, TG | {"samples_ns": [128_000_000] * 3})
    few = [caution.case for caution in cautions(tidy, summarize(tidy)) if "no interval" in caution.text]
    assert few == [plan.case.key for plan in tidy.run.manifest.plan]


def test_all_three_formats_say_the_same(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([PP, TG]))
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(PP)}\n\n{json.dumps(TG)}\n")
    (tmp_path / "bom.json").write_text(json.dumps([PP, TG]), encoding="utf-8-sig")
    (tmp_path / "windows.jsonl").write_text(f"{json.dumps(PP)}\r\n{json.dumps(TG)}\r\n", encoding="utf-16")
    names = [name for name in PP if name != "samples_ns"]
    for table in ("test", "llama_bench"):  # older builds, newer ones
        with closing(sqlite3.connect(tmp_path / table)) as database:  # as `llama-bench -o sql | sqlite3` fills it
            database.execute(f"CREATE TABLE {table} ({', '.join(map(duck.quoted, names))})")
            for test in (PP, TG):
                marks = ", ".join("?" * len(names))
                database.execute(f"INSERT INTO {table} VALUES ({marks})", [str(test[name]) for name in names])
            database.commit()
    by_json, *others = (read_tests(tmp_path / name) for name in ("a.json", "a.jsonl", "bom.json", "windows.jsonl"))
    assert others == [by_json] * 3
    without = [msgspec.structs.replace(test, samples_ns=[]) for test in by_json]
    assert [read_tests(tmp_path / table) for table in ("test", "llama_bench")] == [without, without]


def test_our_own_rows_come_back(tmp_path):
    (document,) = documents("llama-bench").values()
    (tmp_path / "own.jsonl").write_bytes(document)
    folder, _ = imported.store(tmp_path / "own.jsonl", tmp_path / "runs", "own")
    summary = summarize(Tidy.of(read_run(folder)))
    prefill = summary[(summary["phase"] == "prefill") & (summary["n_prompt"] == 128)]
    expected = [TIMED[case.key, "prefill"]["latency_ms"] for case in CASES[:2]]
    assert prefill["latency_ms"].to_list() == pytest.approx(expected)


def test_an_import_goes_out_as_it_came(tmp_path):
    tests = [PP | {"type_k": "q8_0", "n_batch": 256, "no_kv_offload": True}, TG, TG | {"flash_attn": -1, "n_depth": 0}]
    tidy, _ = store(tmp_path, *tests)
    (document,) = documents("llama-bench", tidy, summarize(tidy)).values()
    usual = {"type_k": "", "n_batch": 0, "no_kv_offload": False, "flash_attn": 0}
    for row, test in zip(map(json.loads, document.splitlines()), tests, strict=True):
        expected = usual | test | {"model_filename": "smollm2-135m-f16.gguf"}
        del expected["a field of next year"]
        assert {name: row[name] for name in expected} == expected
    timed = {"prefill[llama 135M F16 llama.cpp cpu float16 ggml t2 b1 p512 n1 d0 s0]"}
    timed |= {
        f"decode[llama 135M F16 llama.cpp cpu float16 {kind} t2 b1 p1 n128 {depth} s0]"
        for kind, depth in (("ggml", "d512"), ("auto", "d0"))
    }
    summary = summarize(tidy)
    assert set(json.loads(documents("bmf", tidy, summary)["bmf.json"])) == timed
    for content in documents("github-action-benchmark", tidy, summary).values():
        assert {entry["name"] for entry in json.loads(content)} == timed
    assert {one["name"] for one in json.loads(benchmark_json(tidy))["benchmarks"]} == timed
    assert documents("benchstat", tidy, summary)["benchstat.txt"].count(b"BenchmarkPrefill") == 3


def test_tests_that_were_set_up_otherwise_are_no_rounds_of_one_case(tmp_path):
    single = {"n_prompt": 1, "n_gen": 0, "n_depth": 0}
    tests = [
        *(PP, PP | {"type_k": "q8_0", "type_v": "q8_0"}, PP | {"n_depth": 64}, PP | {"n_depth": 64}),
        *(PP | single, PP | single | {"n_prompt": 0, "n_gen": 1}),
    ]
    tidy, _ = store(tmp_path, *tests)
    rounds = tidy.turns[tidy.turns["phase"] == "prefill"].groupby("case").size()
    cases = {plan.case.key: plan.case for plan in tidy.run.manifest.plan}
    assert {(cases[key].strategy, cases[key].n_prompt, cases[key].n_depth): count for key, count in rounds.items()} == {
        ("llama.cpp type_k= type_v=", 512, 0): 3,
        ("llama.cpp type_k=q8_0 type_v=q8_0", 512, 0): 3,
        ("llama.cpp", 512, 64): 6,  # the same twice
        ("llama.cpp test=pp", 1, 0): 3,
        ("llama.cpp test=tg", 1, 0): 3,
    }


@pytest.mark.parametrize(
    "other",
    [{"n_cpu_moe": 8}, {"devices": "CUDA0"}, {"no_host": True}, {"load_mode": "dio"}, {"a field of next year": 2}],
)
def test_a_field_that_no_build_of_today_has_tells_tests_apart(tmp_path, other):
    ((name, value),) = other.items()
    tidy, _ = store(tmp_path, PP, PP | other)
    assert tidy.turns.groupby("case").size().to_list() == [3, 3]
    assert f"{name}={int(value) if value is True else value}" in tidy.run.manifest.plan[1].case.strategy


def test_what_a_build_does_not_write_has_its_default(tmp_path):
    tidy, _ = store(tmp_path, PP | {"n_cpu_moe": 0, "use_mmap": 1, "no_host": "0"}, PP | {"use_mmap": True})
    assert len(tidy.run.manifest.plan) == 1


def test_imports_that_were_set_up_otherwise_differ_in_it(tmp_path):
    a, _ = store(tmp_path / "a", PP | {"model_filename": "/there/x.gguf", "type_k": "f16", "n_batch": 512})
    b, _ = store(tmp_path / "b", PP | {"model_filename": "C:\\x.gguf", "type_k": "q8_0", "build_commit": "1"})
    lines = compare(a, b).differences
    assert sorted(lines) == ["git_commit: 8cf427ff -> 1", "n_batch: 512 -> default", "type_k: f16 -> q8_0"]
    assert "type_k=f16" in summarize(a)["setup"][0]
    assert "build_commit" not in summarize(a)["setup"][0]


@pytest.mark.parametrize(
    ("older", "device"),
    [
        ({"cuda": True, "gpu_blas": True, "blas": True}, "cuda"),
        ({"cuda": "1", "vulkan": "0"}, "cuda"),
        ({"blas": 1}, "cpu"),
        ({"cuda": False}, "cpu"),
        ({"vulkan": True, "gpu_blas": True}, "backend vulkan;"),
        ({"metal": "1"}, "backend metal;"),
        ({"cuda": 1, "rpc": 1}, "backend cuda,rpc;"),
        ({"gpu_blas": 1, "blas": 1}, "backend gpu-blas;"),
    ],
)
def test_builds_of_before_there_was_a_field_for_backends(tmp_path, older, device):
    test = {name: value for name, value in PP.items() if name != "backends"} | older | {"n_gpu_layers": 99}
    if device.startswith("backend"):
        with pytest.raises(DataError, match=device):
            store(tmp_path, test)
    else:
        tidy, _ = store(tmp_path, test, test)
        assert [plan.case.device for plan in tidy.run.manifest.plan] == [device]


def test_attention_that_llama_cpp_chose_is_neither_on_nor_off(tmp_path):
    values = [-1, 0, 1, "auto", False, True]
    tidy, notes = store(tmp_path, *(PP | {"flash_attn": value} for value in [*values, "perhaps"]))
    assert notes == ["left out: 1 of 7 tests (flash_attn perhaps)"]
    rounds = frames.turns(tidy.run).groupby("attn_implementation").size()
    assert rounds.to_dict() == {"auto": 6, "ggml": 6, "flash": 6}


def test_a_database_is_found_under_any_name(tmp_path):
    path = tmp_path / "50% of #1?.sqlite"
    with closing(sqlite3.connect(path)) as database:
        names = [name for name in PP if name != "samples_ns"]
        database.execute(f"CREATE TABLE llama_bench ({', '.join(map(duck.quoted, names))})")
        database.execute(
            f"INSERT INTO llama_bench VALUES ({', '.join('?' * len(names))})", [PP[name] for name in names]
        )
        database.commit()
    assert len(read_tests(path)) == 1


@pytest.mark.parametrize("field", ["cpu_info", "gpu_info"])
def test_tests_of_several_machines_are_refused(tmp_path, field):
    with pytest.raises(DataError, match=rf"several machines \({field}: A, B\); import each alone"):
        store(tmp_path, PP | {field: "A"}, PP | {field: ""}, PP | {field: "B"})


def test_a_disk_that_is_full_leaves_nothing_of_an_import(tmp_path):
    tests = [PP | {"n_prompt": number} for number in range(1, 100)]
    path, runs = tmp_path / "many.json", tmp_path / "runs"
    path.write_text(json.dumps(tests))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
        with pytest.raises(UsageError, match=r"--out .*: cannot be written \(File too large\)"):
            imported.store(path, runs, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in runs.rglob("*")] == [".gitignore"]
    folder, _ = imported.store(path, runs, None)
    assert (folder / "samples.jsonl").stat().st_size > 60_000


def test_the_time_of_an_import_is_in_utc_and_that_of_an_export_ends_in_z(tmp_path):
    tidy, _ = store(tmp_path, PP | {"test_time": "2026-04-24T13:58:50+02:00"})
    assert tidy.run.manifest.created_utc == "2026-04-24T11:58:50Z"
    run = msgspec.structs.replace(
        TIDY.run, manifest=msgspec.structs.replace(TIDY.run.manifest, created_utc="2026-11-23T04:00:00+00:00")
    )
    (document,) = documents("llama-bench", Tidy.of(run)).values()
    assert {json.loads(line)["test_time"] for line in document.splitlines()} == {"2026-11-23T04:00:00Z"}


def test_a_quantised_import_goes_out_again(tmp_path):
    tidy, _ = store(tmp_path, PP | {"model_type": "llama 135M Q4_K - Medium"})
    (document,) = documents("llama-bench", tidy, summarize(tidy)).values()
    row = json.loads(document.splitlines()[0])
    assert "Q4_K" in row["model_type"]
    assert row["model_n_params"] == 0  # not known of quantised weights


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"{json.dumps(PP)}\n{{half a li", r"llama\.jsonl, line 2: no JSON"),
        (json.dumps(PP | {"n_prompt": "many"}), r"line 1: no test of llama-bench \(.*n_prompt"),
        (json.dumps({"n_prompt": 1}), r"line 1: no test of llama-bench \(.*missing"),
        (json.dumps(PP | {"samples_ns": [0]}), "line 1: a time is not positive"),
        (json.dumps(PP | {"avg_ns": 10**20}), r"line 1: no test of llama-bench \(.*avg_ns"),
        (json.dumps(PP | {"n_gen": 10**9}), r"line 1: no test of llama-bench \(.*n_gen"),
        (json.dumps(PP | {"test_time": "yesterday"}), r"line 1: test_time is no ISO 8601 \(.*yesterday"),
        ("[" * 200_000, r"llama\.jsonl: not llama-bench's json, jsonl or sqlite \(maximum recursion"),
        ('{"a":' * 200_000, r"llama\.jsonl, line 1: no JSON \(maximum recursion"),
        ("", "holds no test"),
        (json.dumps(PP | {"n_gen": 5}), "left out: 1 of 1 tests .prompt and generation timed together"),
        (json.dumps(PP | {"backends": "Metal"}), "backend Metal; only CPU and CUDA"),
        ("[1, 2", "not llama-bench's json, jsonl or sqlite"),
        ("SQLite format 3\0rubbish", "not llama-bench's json, jsonl or sqlite"),
    ],
)
def test_what_is_no_result_of_llama_bench_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "llama.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message) as refusal:
        imported.store(path, tmp_path / "runs", None)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "runs").exists()


def test_a_run_is_not_imported_twice_under_one_name(tmp_path):
    store(tmp_path, PP)
    with pytest.raises(UsageError, match="exists already"):
        store(tmp_path, PP)
