"""`kvbench ab` end to end on random:tiny, and what it refuses before or while it starts."""

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from bench import fork_server
from bench.ab import record, run, sides
from bench.errors import DataError
from bench.measure import server_process
from bench.measure.server_process import TREE
from tests.ab.test_worktrees import git
from tests.commandline import Printed, kvbench, refused, run_to_the_end
from tests.stub_run import STUB
from tests.torture import store_ab
from tests.untraced import untraced_variables

TINY = ["-m", "random:tiny", "--strategies", "dynamic", "-p", "4", "-n", "3", "-t", "1"]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A small repository of this very code: its first commit has no worker, its second is whole."""
    top = tmp_path_factory.mktemp("repository")
    git(top, "init", "-q", "-b", "main")
    for package in ("kvcache", "bench"):
        shutil.copytree(TREE / package, top / package, ignore=shutil.ignore_patterns("__pycache__"))
        if package == "bench":
            (top / "bench" / "worker.py").rename(top / "later.py")
    git(top, "add", "-A")
    git(top, "commit", "-q", "-m", "without a worker")
    (top / "later.py").rename(top / "bench" / "worker.py")
    git(top, "add", "-A")
    git(top, "commit", "-q", "-m", "whole")
    return top


@pytest.fixture
def stubs(monkeypatch):
    """Workers that speak the protocol without torch (stub_worker.py); everything else is real."""
    monkeypatch.setattr(server_process, "PROGRAM", STUB)


def ab(folder: Path, *words: str, code: int) -> Printed:
    """Run `kvbench ab` in `folder`."""
    with contextlib.chdir(folder):
        return kvbench("ab", *words, "--out", str(folder / "runs"), code=code)


def test_the_same_revision_twice(copy, monkeypatch):
    """The one real A/B of the tests: real workers of two checkouts, whose lines coverage would count as no one's."""
    for name in os.environ.keys() - untraced_variables().keys():
        monkeypatch.delenv(name)
    with contextlib.chdir(copy):
        code, done = run_to_the_end("ab", "HEAD", "HEAD", *TINY, "--budget", "0.05", "-o", "json", "--out", "runs")
    assert code in {0, 4}, done.stderr
    printed = json.loads(done.stdout)
    assert {verdict["phase"] for verdict in printed["verdicts"]} == {"prefill", "decode"}
    (folder,) = (path for path in (copy / "runs").iterdir() if path.is_dir())
    assert not git(copy, "status", "--porcelain")
    manifest, records, finished = record.read(folder)
    assert finished
    trees = [manifest.base.tree, manifest.head.tree]
    assert trees[0] != trees[1]
    assert all(found.max_positions for found in manifest.introductions.values())
    assert sorted(found.code for found in manifest.introductions.values()) == sorted(trees)
    assert not any(Path(tree).exists() for tree in trees)
    assert {record.case for record in records} == {case.key for case in manifest.cases}
    assert f"against {manifest.base.label}; a change up to 3 % counts as none" in printed["title"]
    again = kvbench("report", str(folder), "-o", "json", code=code)
    assert json.loads(again.stdout) == printed
    path = folder / record.PAIRS
    path.write_bytes(
        b"".join(path.read_bytes().splitlines(keepends=True)[:-2]) + b'{"crc32": 12'
    )  # as a kill leaves it
    code, killed = run_to_the_end("report", str(folder), "-o", "json")
    assert code in {0, 4}
    assert json.loads(killed.stdout)["title"] == f"{printed['title']} (unfinished)"
    assert "the record of an A/B, no run; `kvbench report" in refused("compare", str(folder), str(folder), code=3)
    assert len(git(copy, "worktree", "list").splitlines()) == 1

    stored = folder / record.MANIFEST
    stored.write_text(stored.read_text().replace('"schema_version": 3', '"schema_version": 1'))
    with pytest.raises(DataError, match=r"schema 1 is older than this kvbench reads \(3\)"):
        record.read(folder)


def test_a_revision_without_the_worker_protocol_is_not_comparable(copy):
    done = ab(copy, "HEAD~1", "HEAD", *TINY, code=3)
    assert "base" in done.stderr
    assert "no worker protocol" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.usefixtures("stubs")
def test_another_protocol_is_not_comparable(copy):
    protocol = copy / "bench" / "protocol.py"
    whole = protocol.read_text()
    protocol.write_text(whole.replace("VERSION = 1", "VERSION = 99"))
    try:
        done = ab(copy, "HEAD", *TINY, code=3)
    finally:
        protocol.write_text(whole)
    assert done.stderr.count("\n") == 1
    assert "head (working tree on " in done.stderr
    assert "speaks worker protocol 99" in done.stderr


@pytest.mark.usefixtures("stubs")
def test_a_head_that_emits_other_tokens_fails(tmp_path):
    script = json.dumps({"dynamic": [{"on": "check", "do": "wrong"}]})
    done = ab(tmp_path, *TINY, "--head-env", f"STUB={script}", "--budget", "1", code=5)
    assert "emitted other tokens" in done.stdout


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "name the revision to compare with"),
        (["nowhere"], "no such revision"),
        (["HEAD", "--threshold", "0"], "--threshold 0"),
        (["HEAD", "--threshold", "1"], "--threshold 1"),
        (["HEAD", "--threshold", "nan"], "--threshold nan"),
        (["HEAD", "--budget", "0"], "--budget 0"),
        (["HEAD", "--budget", "nan"], "--budget nan"),
        (["HEAD", "--head-env", "novalue"], "give NAME=VALUE"),
        (["HEAD", "--head-env", "PYTHONPATH=x"], "set it for both"),
        (["--head-python", "/nowhere/python"], "--head-python /nowhere/python"),
        (["HEAD", "--name", "a/b"], "a name has only"),
        (["HEAD", "--head-python", "./nowhere/python"], "/nowhere/python: No such file"),
    ],
)
def test_bad_input_is_refused_in_one_line(copy, words, text):
    done = ab(copy, *words, *TINY, code=2)
    assert text in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.usefixtures("stubs")
def test_a_prompt_beyond_the_models_positions_is_refused_in_one_line(copy, monkeypatch):
    """What the sides' processes know of the model decides."""
    monkeypatch.setenv("STUB_FACTS", json.dumps({"max_positions": 1024}))
    done = ab(copy, "HEAD", *TINY, "-p", "100000", code=2)
    assert "positions of random:tiny" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("spec", ["py:", "py::build", "py:broken.inner:build", "py:nowhere:build"])
@pytest.mark.usefixtures("stubs")
def test_a_model_that_cannot_be_imported_is_refused_in_one_line(tmp_path, spec, monkeypatch):
    """A fork server's own words on such a model, found in this process, as both sides' servers would print them."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "__init__.py").write_text("1 / 0")
    monkeypatch.setattr(sys, "path", list(sys.path))
    with contextlib.chdir(tmp_path):
        facts = fork_server.origin(spec.removeprefix("py:").partition(":")[0]) | fork_server.description(spec)
    assert facts["model_code"] is None
    monkeypatch.setenv("STUB_FACTS", json.dumps(facts))
    done = ab(tmp_path, "-m", spec, *TINY[2:], "--head-env", "A=1", code=2)
    assert f"--model {spec}" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_paths_are_meant_from_the_current_folder(tmp_path):
    (tmp_path / "love").mkdir()
    love = str(tmp_path / "love")
    assert sides.absolute_folders(("love", "./love", "random:tiny"), tmp_path) == (love, love, "random:tiny")
    (tmp_path / "python").symlink_to(sys.executable)
    assert sides.absolute("./love/../python", tmp_path) == str(tmp_path / "python")
    assert sides.absolute("python3", tmp_path) == "python3"


def test_an_ab_leaves_nothing_that_git_shows(tmp_path):
    git(tmp_path, "init", "-q")
    manifest = record.read(store_ab(tmp_path.parent / "stored")).manifest
    run._make_folder(tmp_path / "results" / "runs", "first", manifest)
    assert not git(tmp_path, "status", "--porcelain")


def test_a_repository_of_other_code_can_differ_only_in_its_model(tmp_path):
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "empty")
    done = ab(tmp_path, "HEAD", *TINY, code=2)
    assert "--model py:module:factory" in done.stderr


def test_a_stored_ab_that_is_damaged_or_gone_is_refused(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        record.read(tmp_path)
    (tmp_path / record.MANIFEST).write_text("{}")
    with pytest.raises(DataError, match="damaged"):
        record.read(tmp_path)
