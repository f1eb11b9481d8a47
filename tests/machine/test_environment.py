import re
import subprocess
import sys
from pathlib import Path

import msgspec
import psutil
import pytest
import torch

from bench.errors import UsageError
from bench.machine import environment
from bench.machine.environment import (
    TorchFacts,
    read_environment,
    read_torch_facts,
)
from bench.manifest import Environment

FACTS = TorchFacts(isa="AVX2", gpu="NVIDIA Test", gpu_driver="580.1")


def test_a_container_without_proc_is_refused_by_what_to_mount(monkeypatch: pytest.MonkeyPatch):
    def missing() -> None:
        raise FileNotFoundError(2, "No such file or directory", "/proc/meminfo")

    monkeypatch.setattr(psutil, "virtual_memory", missing)
    with pytest.raises(UsageError, match=r"/proc/meminfo is not there.*mount -t proc"):
        read_environment(FACTS)


def test_environment_of_this_machine_is_complete_and_survives_storage():
    found = read_environment()
    assert found.cores >= 1
    assert found.cpu_model
    assert found.memory_bytes == psutil.virtual_memory().total
    assert torch.__version__.startswith(found.torch)  # PyPI's CUDA build is 2.13.0 there, and calls itself 2.13.0+cu130
    assert found.isa == torch.backends.cpu.get_cpu_capability()
    assert re.fullmatch(r"\d+\.\d+\.\d+", found.kvbench)
    assert msgspec.json.decode(msgspec.json.encode(found), type=Environment) == found


def test_equal_machines_have_equal_fingerprints():
    first, second = read_environment(FACTS), read_environment(FACTS)
    assert first.fingerprint == second.fingerprint


def test_torch_is_not_asked_when_a_worker_has_answered(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    found = read_environment(FACTS)
    assert (found.isa, found.gpu, found.gpu_driver) == FACTS


def test_torch_facts_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert read_torch_facts() == TorchFacts(torch.backends.cpu.get_cpu_capability(), None, None)


def test_transparent_hugepage_and_governor(files, monkeypatch):
    assert environment._transparent_hugepage() is None
    files(
        {
            "/sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
            "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "performance\n",
        }
    )
    found = read_environment(FACTS)
    assert found.transparent_hugepage == "madvise"
    assert found.governor == "performance"


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.com", "-c", "commit.gpgsign=false"]
    answer = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return answer.stdout.strip()


def test_git_commit_with_plus_where_tracked_files_differ(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment.git_commit() is None  # no repository
    git(tmp_path, "init", "-q")
    assert environment.git_commit() is None  # no commit
    Path("file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-q", "-m", "one")
    git(tmp_path, "tag", "-a", "v1", "-m", "a tag is not what is asked for")
    commit = git(tmp_path, "rev-parse", "HEAD")
    Path("untracked").touch()
    assert environment.git_commit() == commit
    Path("file").write_text("two")
    assert environment.git_commit() == commit + "+"
    monkeypatch.setenv("PATH", "")
    assert environment.git_commit() is None  # no git
