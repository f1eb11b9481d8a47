"""What inductor compiles with and where: stub compilers, and folders of all names; the real one with `-m compiled`."""

from __future__ import annotations

import _ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._inductor import config
from torch._inductor.cpp_builder import cpp_compiler_search
from torch._inductor.utils import clear_caches

from kvcache.caches.contract import Unsupported
from kvcache.compiled import compiler as module
from kvcache.compiled.compiler import WHOLE_VECTORS, require_compiler
from kvcache.compiled.strategy import Compiled
from kvcache.proof.tokens import agreement, reference
from tests.tiny import ARCHITECTURES, token_ids

COMPILES = f"""#!/bin/sh
# Notes its arguments, and puts a library of Python's own where -o says.
echo "$@" >> "$(dirname "$0")/log"
for word; do
    case $before in -o) out=$word ;; esac
    case $word in
        *.cpp) [ -f "$word" ] || {{ echo "g++: error: $word: No such file or directory"; exit 1; }} ;;
        --version) echo "g++ (stub) 13"; exit 0 ;;
    esac
    before=$word
done
cp '{_ctypes.__file__}' "$out"
"""

SAYS_WHO = "#!/bin/sh\n[ $1 = --version ] && echo g++ 13 && exit\n"


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Give inductor a cache folder of the test's own, and forget which compiler it found."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with config.patch({"cpp.cxx": None, "cpp.march": None, "cpp_cache_precompile_headers": True}):
        yield
    forget()


def forget() -> None:
    clear_caches()
    cpp_compiler_search.cache_clear()


def compiler(folder: Path, script: str = COMPILES) -> Path:
    """Write the stub of a compiler into `folder` and forget any other."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "g++"
    program.write_text(script)
    program.chmod(0o755)
    forget()
    return program


def log(program: Path) -> str:
    return (program.parent / "log").read_text()


@pytest.mark.parametrize("folder", ["plain", "ünïcode", "with space", "a 'quote'", 'double"quote'])
def test_a_path_to_the_compiler(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = compiler(tmp_path / folder)
    monkeypatch.setenv("CXX", str(program))
    require_compiler()
    assert ".cpp" in log(program)


def test_a_prefix_and_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = tmp_path / "my tools" / "ccache"
    program = compiler(tmp_path / "bin")
    prefix.parent.mkdir()
    prefix.write_text('#!/bin/sh\necho "$1" >> "$(dirname "$0")/log"\nexec "$@"\n')
    prefix.chmod(0o755)
    monkeypatch.setenv("CXX", f"'{prefix}' {program} -DA='b c'")
    require_compiler()
    assert str(program) in log(prefix)
    assert "-DA=b c" in log(program)


KNOWS_NO_MOVES = COMPILES.replace(
    "for word; do",
    """for word; do
    case $word in -mmove-max=*) echo "g++: error: unrecognized command-line option"; exit 1 ;; esac""",
)


@pytest.mark.parametrize(
    ("capability", "script", "named", "march"),
    [
        ("AVX2", COMPILES, None, WHOLE_VECTORS),
        ("AVX2", KNOWS_NO_MOVES, None, None),
        ("AVX2", COMPILES, "x86-64-v3", "x86-64-v3"),
        ("AVX512", COMPILES, None, None),
    ],
    ids=["gcc-12", "older", "named", "avx-512"],
)
def test_integer_vectors_are_moved_whole_where_the_compiler_can(
    capability: str,
    script: str,
    named: str | None,
    march: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = compiler(tmp_path / "bin", script)
    monkeypatch.setenv("CXX", str(program))
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    with config.patch({"cpp.march": named}):
        for _ in range(2):
            require_compiler()
            assert config.cpp.march == march
    assert ("-mmove-max=256" in log(program)) == (capability == "AVX2" and named is None)


def test_an_empty_cxx_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = compiler(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.setenv("CXX", "")
    require_compiler()
    assert ".cpp" in log(program)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (
            f"{SAYS_WHO}echo Included from k.cpp:2:\necho k.cpp:2:10: fatal error: no omp.h\nexit 1\n",
            "fatal error: no omp.h$",
        ),
        (f"{SAYS_WHO}kill -9 $$\n", "without a word"),
        ("#!/bin/sh\nexit 3\n", "No working C\\+\\+ compiler"),
        ("#!/nowhere\n", "No such file|No working"),
        (COMPILES.replace(f"cp '{_ctypes.__file__}'", "echo no library >"), "file too short|ELF"),
        (COMPILES.replace(f"cp '{_ctypes.__file__}'", ": >"), "file too short|ELF"),
    ],
    ids=["no-openmp", "killed", "no-version", "no-interpreter", "no-library", "empty-library"],
)
def test_a_compiler_that_fails_is_unsupported(
    script: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(compiler(tmp_path / "bin", script)))
    with pytest.raises(Unsupported, match=reason) as refused:
        Compiled(ARCHITECTURES["llama"]())
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("cxx", ["'g++", " ", "nowhere g++"])
def test_a_command_that_is_none(cxx: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", cxx)
    with pytest.raises(Unsupported, match="CXX"):
        require_compiler()


@pytest.mark.parametrize(
    ("script", "reason"),
    [("#!/nowhere\n", "No such file or directory"), ("#!/bin/sh\nexec sleep 60\n", "timed out")],
)
def test_a_compiler_that_does_not_say_which_it_is(
    script: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ANSWER_SECONDS", 0.1)
    monkeypatch.setenv("CXX", str(compiler(tmp_path / "bin", script)))
    with pytest.raises(Unsupported, match=rf"g\+\+ --version failed: .*{reason}.*CXX"):
        module.compiler_facts()


@pytest.mark.parametrize("name", ["with space", "it's", 'a"b', "back\\slash"])
def test_a_cache_folder_that_inductor_cannot_take_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(compiler(tmp_path / "bin")))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / name))
    with pytest.raises(Unsupported, match="set TORCHINDUCTOR_CACHE_DIR to a path without spaces"):
        require_compiler()


def test_a_cache_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(compiler(tmp_path / "bin")))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "bin" / "g++" / "cache"))
    with pytest.raises(Unsupported, match="Not a directory"):
        require_compiler()


@pytest.mark.parametrize("cause", ["space", "openssl"])
def test_headers_are_not_precompiled_where_inductor_cannot(
    cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(compiler(tmp_path / "bin")))
    if cause == "space":
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "a b"))
    else:
        monkeypatch.setattr("shutil.which", lambda name: None if name == "openssl" else name)
    require_compiler()
    assert not config.cpp_cache_precompile_headers


@pytest.mark.compiled
def test_the_real_compiler_behind_a_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "env g++ -DANYTHING='x y'")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "ünïcode"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    forget()
    torch.compiler.reset()
    model, prompt = ARCHITECTURES["llama"](), token_ids(2, 1, 9)
    strategy = Compiled(model)
    strategy.prepare(1, 20)
    assert agreement(strategy, prompt, reference(model, prompt, 10)).tokens_match == "true"
