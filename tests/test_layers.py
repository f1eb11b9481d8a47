"""What must work where torch and transformers cannot be imported; import-linter checks the layers themselves."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import bench
import kvcache

ROOT = Path(__file__).resolve().parent.parent
NEEDS_TORCH = {"bench.worker"}
"""The modules of bench that import torch at their top; every other one brings it when it runs a model, or never."""

BLOCKED = """
import sys
for name in ("torch", "transformers", "accelerate", "gguf", "safetensors"):
    sys.modules[name] = None  # `import name` raises ImportError
"""


def run_blocked(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCKED + code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_the_block_blocks():
    answer = run_blocked("import transformers")
    assert answer.returncode != 0
    assert "ModuleNotFoundError" in answer.stderr


MODULES = {f"bench.{module.name}" for module in pkgutil.iter_modules(bench.__path__)}


def test_all_of_bench_but_the_worker_imports_without_torch():
    names = sorted(MODULES - NEEDS_TORCH)
    answer = run_blocked(f"import importlib\nfor name in {names}: importlib.import_module(name)")
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize("package", ["bench", "kvcache"])
def test_importing_a_package_brings_nothing_along(package):
    answer = run_blocked(
        f"before = set(sys.modules)\nimport {package}\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        f"assert not new - {{{package!r}}} - sys.stdlib_module_names, new"
    )
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize("name", kvcache.__all__)
def test_public_names_come_from_their_modules(name):
    found = getattr(kvcache, name)
    assert found.__name__ == name
    assert found.__module__.startswith("kvcache.")
    assert name in dir(kvcache)


def test_costs_come_without_torch():
    answer = run_blocked("import kvcache; print(kvcache.Costs.__name__)")
    assert answer.stdout == "Costs\n", answer.stderr


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'kvcache' has no attribute 'Dynamik'"):
        kvcache.Dynamik  # noqa: B018
    assert not hasattr(importlib.reload(kvcache), "__wrapped__")


def test_kvcache_never_imports_bench():
    answer = run_blocked("")
    assert answer.returncode == 0
    names = [f"kvcache.{module.name}" for module in pkgutil.iter_modules(kvcache.__path__)]
    code = (
        f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\nassert 'bench' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120, check=True)
