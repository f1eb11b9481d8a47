"""What a worker does wrong -> what is stored, said, and left with; the workers are stubs that do it on purpose."""

import json
import os
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from bench.case import Group
from bench.measure import server_process, worker_process
from bench.measure.worker_process import WorkerFailed, WorkerProcess
from bench.protocol import Load
from bench.store.run_folder import read_run
from tests import stub_run
from tests.handmade import make_case

STRATEGIES = "naive,dynamic,static,compiled,hf-generate"
GRID = ["--preset", "smoke", "-p", "8", "--strategies", STRATEGIES, "-r", "2", "--no-ceilings"]


def ended(out: Path, script: dict[str, Any], *flags: str) -> tuple[object, dict[str, dict[str, Any]], str]:
    """Exit code, decode rows by strategy, and what was said."""
    code, text, errors = stub_run.finish(["run", *GRID, "-o", "json", "--out", str(out), *flags], out, script)
    rows = {row["strategy"]: row for row in json.loads(text) if row["phase"] == "decode"}
    return code, rows, errors


def test_pinned_kernels_stand_in_the_manifest_and_reach_the_workers(tmp_path: Path) -> None:
    pinned = {"64x32 float32, step of 1": "sum-4"}
    file, out = tmp_path / "kernels.json", tmp_path / "out"
    file.write_text(json.dumps({"kernels": pinned}))
    for flags, kernels in ([], None), (["--kernels", "default"], {}), (["--kernels", str(file)], pinned):
        code, rows, _ = ended(out, {"compiled": [{"on": "check", "do": "say kernels"}]}, *flags)
        assert code == 5
        assert rows["compiled"]["error"] == f"kernels: {kernels}"
        (folder,) = out.glob("[!.]*")
        assert read_run(folder).manifest.kernels == kernels
        shutil.rmtree(out)


def test_one_worker_that_fails_costs_its_case_alone(tmp_path: Path) -> None:
    script = {
        "dynamic": [{"at": 3, "do": "crash"}],
        "static": [{"at": 3, "do": "kill"}],
        "compiled": [{"at": 3, "do": "refuse", "status": "oom", "error": "MemoryError: no message"}],
        "hf-generate": [{"at": 3, "do": "wrong"}],
    }
    code, rows, errors = ended(tmp_path, script)
    assert code == 5
    assert {name: (row["status"], row["error"]) for name, row in rows.items()} == {
        "naive": ("ok", None),
        "dynamic": ("failed", "the worker ended with exit code 7: stub: crashed as scripted"),
        "static": ("oom", "the worker was killed (signal 9): most likely out of memory"),
        "compiled": ("oom", "MemoryError: no message"),
        "hf-generate": ("failed", "hf-generate emitted other tokens in a timed turn than when it was checked"),
    }
    assert "failed: dynamic, prompt " in errors


def test_a_worker_that_hangs_is_given_up_on_and_what_is_not_supported_is_no_failure(tmp_path: Path) -> None:
    refusal = {"on": "load", "do": "refuse", "status": "unsupported", "error": "no compiler"}
    script = {"static": [{"at": 1, "do": "hang"}], "compiled": [refusal]}
    code, rows, _ = ended(tmp_path, script, "--timeout", "2")
    assert code == 5
    assert {row["strategy"]: row["status"] for row in rows.values()} == {
        "naive": "ok",
        "dynamic": "ok",
        "static": "timeout",
        "compiled": "unsupported",
        "hf-generate": "ok",
    }
    assert rows["static"]["error"].startswith("no reply within ")
    assert rows["static"]["error"].endswith(" s (what --timeout left)")


def statuses(out: Path, script: dict[str, Any], *flags: str) -> dict[tuple[str, int], str]:
    """Return the status of each case, by strategy and prompt length."""
    grid = ["--preset", "smoke", "-p", "8,16", "--strategies", "naive,dynamic", "-r", "1", "--no-ceilings", *flags]
    _, text, errors = stub_run.finish(["run", *grid, "-o", "json", "--out", str(out)], out, script)
    assert text, errors
    return {(row["strategy"], row["n_prompt"]): row["status"] for row in json.loads(text) if row["phase"] == "decode"}


def test_a_worker_that_was_given_up_on_is_not_alive_while_it_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_process, "PROGRAM", stub_run.STUB)
    hang = {"STUB": json.dumps({"": [{"on": "load", "do": "hang"}]})}
    group: Group = make_case("naive").group
    with server_process.ForkServer("", 1, variables=hang) as server:
        server.wait()
        with server.fork() as worker:
            with monkeypatch.context() as patch:
                patch.setattr(psutil.Process, "kill", lambda _: None)  # the signal is still on its way
                with pytest.raises(WorkerFailed, match=r"no reply within 0 s$"):
                    worker.ask(Load(group=group, strategy="", naive_logits="last", seed=0), 0.1)
            assert psutil.pid_exists(worker.pid)
            assert not worker.alive


def test_after_a_reference_that_hangs_the_next_cell_has_a_new_one(tmp_path: Path) -> None:
    found = statuses(tmp_path, {"": [{"on": "make-reference", "do": "hang", "times": 1}]}, "--timeout", "1")
    assert found == {(name, n): status for n, status in ((8, "timeout"), (16, "ok")) for name in ("naive", "dynamic")}


def test_a_worker_that_ends_after_its_answer_is_started_anew(tmp_path: Path) -> None:
    script = {"dynamic": [{"at": 1, "do": "refuse", "error": "CUDA error", "ends": True, "times": 1}]}
    found = statuses(tmp_path, script)
    assert found == {("naive", 8): "ok", ("dynamic", 8): "failed", ("naive", 16): "ok", ("dynamic", 16): "ok"}
    (folder,) = (path.parent for path in tmp_path.glob("*/manifest.json"))
    (failure,) = read_run(folder).failures
    assert (failure.error, failure.worker_died) == ("CUDA error", True)


@pytest.mark.parametrize(("refused", "code"), [(["dynamic"], 0), (["naive", "dynamic"], 5)])
def test_a_run_fails_if_nothing_of_it_is_supported(refused: list[str], code: int, tmp_path: Path) -> None:
    refusal = [{"on": "load", "do": "refuse", "status": "unsupported", "error": "no compiler"}]
    ended_with, rows, _ = ended(tmp_path, dict.fromkeys(refused, refusal), "--strategies", "naive,dynamic")
    assert ended_with == code
    assert [rows[name]["status"] for name in refused] == ["unsupported"] * len(refused)


def test_processes_are_forked_by_servers_of_their_own(tmp_path: Path) -> None:
    """The second of `--processes 2` comes from another parent, which has other addresses."""
    code, rows, _ = ended(tmp_path, {}, "--processes", "2", "--strategies", "dynamic")
    assert code == 0
    assert {row["samples"] for row in rows.values()} == {4}


def test_a_server_that_forks_nothing_is_late_or_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, its = socket.socketpair()

    def serve(*reply: bytes) -> None:
        """Answer the next connection, and close it."""
        (connection,) = socket.recv_fds(its, 1, 1)[1]
        for line in reply:
            os.write(connection, line)
        os.close(connection)

    def refusal() -> str:
        with pytest.raises(WorkerFailed, match="no worker could be forked: ") as failed:
            WorkerProcess(mine, tmp_path, lambda _: None)
        return str(failed.value).partition(": ")[2]

    with mine, its:
        with ThreadPoolExecutor() as pool:
            pool.submit(serve)
            assert refusal() == "the fork server ended"
            pool.submit(serve, b'{"refused": "Resource temporarily unavailable"}\n')
            assert refusal() == "Resource temporarily unavailable"
        monkeypatch.setattr(worker_process, "FORK_TIMEOUT_S", 0.01)
        assert refusal() == "no answer within 0 s"
        its.close()
        assert "Broken pipe" in refusal()
