"""`kvbench run`: a real run of a tiny model, what it refuses, and what a failed case does."""

import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from bench.machine.affinity import user_variables
from tests import inline
from tests.commandline import TINY, kvbench, refused


def test_run_leaves_everything_behind(real_run: Path) -> None:
    names = {path.name for path in real_run.iterdir()}
    assert {"manifest.json", "samples.jsonl", "summary.csv", "summary.json", "summary.md", "plots"} <= names
    plots = {path.name for path in (real_run / "plots").iterdir()}
    assert {
        f"{name}.{suffix}" for name in ("step_latency", "throughput", "speedup") for suffix in ("png", "svg")
    } <= plots
    summary = pd.read_csv(real_run / "summary.csv", dtype={"tokens_match": str})
    assert len(summary) == 2 * 4 * 2
    assert set(summary["tokens_match"]) == {"true"}
    assert set(summary["status"]) == {"ok"}
    assert summary[["latency_ms", "mfu", "predicted_ms"]].notna().all(axis=None)
    assert not (summary["latency_ms_low"] > summary["latency_ms"]).any()  # there is none where rounds were disturbed
    assert (summary.loc[summary["strategy"] == "naive", "speedup_vs_naive"] == 1).all()
    assert not (summary["mfu_low"] > summary["mfu"]).any()
    assert summary["mbu"].notna().all()  # of a read as small, which the cache holds as well


def test_counters_are_those_of_the_contract(real_run: Path) -> None:
    rows = pd.read_csv(real_run / "summary.csv").set_index(["n_prompt", "strategy", "phase"])
    assert rows.loc[(16, "naive", "prefill"), "tokens_processed"] == 16
    assert rows.loc[(16, "naive", "decode"), "tokens_processed"] == 17 + 18 + 19
    assert rows.loc[(16, "dynamic", "decode"), "tokens_processed"] == 3
    assert rows.loc[(16, "dynamic", "decode"), "forward_calls"] == 3
    cached = rows.xs("dynamic", level="strategy")
    assert (cached["kv_bytes_predicted"] == cached["kv_bytes_measured"]).all()


def test_dry_run_measures_nothing(tmp_path: Path) -> None:
    done = kvbench("run", *TINY, "--out", str(tmp_path), "--dry-run")
    assert "8 cases" in done.stdout
    assert not list(tmp_path.iterdir())


def test_the_readmes_grid_of_a_random_model_fits_it(tmp_path: Path) -> None:
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    (example,) = [line for line in readme.splitlines() if line.startswith("kvbench run -m random:")]
    printed = kvbench(*shlex.split(example, comments=True)[1:], "--out", str(tmp_path), "--dry-run")
    assert "cases, 6 rounds each" in printed.stdout


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
        (["--timeout", "0"], "--timeout 0: give a number from 1 to 1000000"),
        (["--strategies", "dinamic"], "did you mean dynamic"),
        (["--strategies", "dynamic,cache:mine"], "cache:mine: give cache:module:factory, as in cache:my_cache:make"),
        (["--strategies", "cache::make"], "give cache:module:factory"),
        (["--strategies", "cache:a:b:c"], "give cache:module:factory"),
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
        (["--strategies", "fp8", "--text", "/nowhere"], "--text /nowhere: cannot be read (No such file or directory)"),
        (["--prefill-quantized"], "no strategy of the grid supports it; add compiled-int4 or compiled-int8"),
        (["--kernels", "/nowhere"], "--kernels /nowhere cannot be read (No such file or directory)"),
        (["--device", "cuda", "--kernels", "default"], "--kernels: on cuda there is no choice"),
        (["--resume", "x", "--kernels", "default"], "leave out --kernels, --model"),
        (["--resume", "x", "--text", "y"], "leave out --model, --text"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inline.use(monkeypatch)
    assert says in refused("run", "-m", "random:tiny", "--out", str(tmp_path / "out"), *arguments)
    assert not (tmp_path / "out").exists()


def test_cuda_is_refused_where_there_is_none() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert "no CUDA device" in refused("run", *TINY, "--device", "cuda")


def test_unwritable_out_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inline.use(monkeypatch)
    for name in user_variables():  # a run says what becomes of them
        monkeypatch.delenv(name)
    (tmp_path / "file").write_text("")
    assert "--out" in refused("run", *TINY, "--out", str(tmp_path / "file"))


@pytest.fixture
def own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    """Write the module of a tiny model whose forward is changed, into the current folder; its name as a model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("bench.tell.report.write_plots", lambda report, derived: {})

    def write(name: str, forward: str) -> str:
        monkeypatch.delitem(sys.modules, name, raising=False)
        Path(f"{name}.py").write_text(
            "from kvcache.models import load\n"
            "def factory():\n"
            "    model = load('random:tiny')\n"
            "    class Changed(type(model)):\n"
            "        def forward(self, *arguments, **named):\n"
            f"            {forward}\n"
            "    model.__class__ = Changed\n"
            "    return model\n"
        )
        return f"py:{name}:factory"

    return write


GRID = ["-t", "1", "-n", "3", "-r", "1", "--strategies", "naive,dynamic", "--no-ceilings", "--out", "runs"]


def test_other_tokens_are_code_5(own_model: Callable[[str, str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose cached path is wrong gets no time for it."""
    inline.use(monkeypatch)
    flipping = (
        "out = super().forward(*arguments, **named); "
        "out.logits = out.logits.flip(-1) if named.get('past_key_values') is not None else out.logits; return out"
    )
    done = kvbench("run", "-m", own_model("broken", flipping), "-p", "8", *GRID, code=5)
    rows = pd.read_csv(Path(done.stdout.strip().splitlines()[-1]) / "summary.csv", dtype={"tokens_match": str})
    rows = rows.set_index(["strategy", "phase"])
    assert rows.loc[("dynamic", "decode"), "tokens_match"] == "false"
    assert pd.isna(rows.loc[("dynamic", "decode"), "latency_ms"])
    assert rows.loc[("naive", "decode"), "status"] == "ok"


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("typo:biuld", r"module typo \(.*typo\.py\) has no biuld; did you mean build\?"),
        ("typo.py:build", r"typo\.py is a file; give its module, typo"),
        ("nowhere:build", r"No module named 'nowhere' \(looked in .* and on Python's path\)"),
        ("broken_import:build", r"raised ModuleNotFoundError: No module named 'missing_library' \(.*, line 1\)"),
    ],
)
@pytest.mark.parametrize("kind", ["py", "cache"])
@pytest.mark.parametrize("dry", [True, False])
def test_own_code_that_is_not_there_is_refused_once(
    dry: bool, kind: str, spec: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller reads what was looked for, where, and what may have been meant; the name stands there once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "typo.py").write_text("def build(): ...\n")
    (tmp_path / "broken_import.py").write_text("import missing_library\n")
    spec = f"{kind}:{spec}"
    own = ["-m", spec] if kind == "py" else ["-m", "random:tiny", "--strategies", f"dynamic,{spec}"]
    line = refused("run", *own, "-p", "8", "-n", "2", "--out", str(tmp_path / "out"), *["--dry-run"] * dry)
    flag = "--model" if kind == "py" else "--strategies"
    assert re.fullmatch(f"kvbench: {flag} {re.escape(spec)}:? {says}\n", line)
    assert not (tmp_path / "out").exists()
    sys.modules.pop("typo", None)
