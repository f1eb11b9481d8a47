"""What must work where torch and transformers cannot be imported; import-linter checks the layers themselves."""

import importlib
import multiprocessing
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import kvcache

ROOT = Path(__file__).resolve().parents[1]
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
"""The layers that `nox -s lint` checks; what must not need torch is listed there, once."""

(TORCH_FREE,) = [contract["source_modules"] for contract in CONTRACTS if contract["type"] == "forbidden"]

# A finder, not None in sys.modules: scipy asks there whether torch is loaded, and would take None for it.
BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "accelerate", "gguf", "safetensors"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
"""


def run_blocked(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCKED + code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_the_block_blocks():
    answer = run_blocked("import transformers")
    assert answer.returncode != 0
    assert "transformers is blocked" in answer.stderr


def test_imports_without_torch():
    # In one process: what is imported first brings in nothing that the block forbids, or it fails itself.
    code = f"""
import importlib, pkgutil
for name in {[*TORCH_FREE, "bench.cli"]}:
    module = importlib.import_module(name)
    for found in pkgutil.walk_packages(getattr(module, "__path__", []), name + "."):
        importlib.import_module(found.name)
"""
    answer = run_blocked(code)
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
        kvcache.Dynamik  # noqa: B018  looking is the test


def test_kvcache_never_imports_bench():
    """In a fork of this process, which has torch and transformers already: every module of kvcache is imported anew."""
    names = [module.name for module in pkgutil.walk_packages(kvcache.__path__, "kvcache.")]

    def import_all():
        for loaded in [name for name in sys.modules if name.partition(".")[0] in {"bench", "kvcache"}]:
            del sys.modules[loaded]
        for name in names:
            importlib.import_module(name)
        assert not any(name.partition(".")[0] == "bench" for name in sys.modules)

    child = multiprocessing.get_context("fork").Process(target=import_all)
    child.start()
    child.join(timeout=120)
    assert child.exitcode == 0
