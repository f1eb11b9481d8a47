"""Try inductor's own way to a loaded C++ library before a model depends on it."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path
from typing import Any

import torch

from kvcache.caches.contract import Unsupported

TRIAL = '#include <Python.h>\n#include <omp.h>\nextern "C" int threads() { return omp_get_max_threads(); }\n'
"""What any kernel needs: Python's headers and OpenMP."""
NOTHING = '#include <torch/csrc/inductor/cpp_prefix.h>\nextern "C" void kernel(const float*) {}\n'
"""The smallest kernel that includes what all of inductor's do."""

WHOLE_VECTORS = "native -mmove-max=256 -mstore-max=256"
"""What GCC is to compile for under AVX2, from its version 12 on.

torch's load of an integer vector copies it to the stack first (`vec256_int.h`). GCC copies by 16 bytes, and a load of
32 that were stored in halves waits for both; by 32 bytes it leaves the copy out. A step of `compiled-int8` after 7,936
positions took 1.18 of `compiled`'s time and takes 0.75, of `compiled-int4` 1.14 and 0.84 (SmolLM2-135M, float32, two
cores of Zen 3; GCC 12.2)."""

ANSWER_SECONDS = 30.0
"""How long a compiler may take to say its version."""


def require_compiler() -> None:
    """Prepare inductor for the compiler that CXX names, and compile and load a few lines where it will put kernels.

    CXX may be a program, with spaces in its path, or a command with a prefix and arguments (`ccache g++ -m64`).
    The trial takes half a second where it is new; inductor keeps its library as it keeps kernels.

    Under AVX2, kernels are compiled for WHOLE_VECTORS if the compiler can, unless TORCHINDUCTOR_CPP_MARCH is set.

    Raises:
        Unsupported: there is no compiler, or the trial fails; with the reason of whoever refused it.
    """
    command = _command()
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        raise Unsupported(f"compiled needs Python's headers, as in the package python3-dev: there is no {header}")
    from torch._inductor import config  # here: a second of imports, for the CPU alone
    from torch._inductor.codecache import CppCodeCache

    # Headers are hashed by openssl and precompiled in the temporary folder; without, kernels compile a little slower.
    if shutil.which("openssl") is None or not _is_plain(tempfile.gettempdir()):
        config.cpp_cache_precompile_headers = False
    named = config.cpp.march  # by TORCHINDUCTOR_CPP_MARCH
    is_open = named is None and torch.backends.cpu.get_cpu_capability() == "AVX2"
    for march in (WHOLE_VECTORS, named) if is_open else (named,):
        try:
            config.cpp.cxx = (None, _program(command))
            config.cpp.march = march
            CppCodeCache.load(TRIAL, needs_vec_isa=False)
        except Exception as error:
            if march != named:
                continue  # another compiler, or an older one
            raise Unsupported(f"inductor cannot compile here with {shlex.join(command)}: {_reason(error)}") from error
        return


@contextmanager
def headers_ahead(options: Mapping[str, Any]) -> Iterator[None]:
    """Have inductor's headers precompiled, under its `options`, while the body traces what will include them.

    Once for a cache folder: it takes the compiler three seconds of a first compilation's thirteen (SmolLM2-135M, two
    cores of Zen 3). A failure is left to whoever needs the headers.
    """
    from torch._inductor import config

    def compile_nothing() -> None:
        from torch._inductor.codecache import CppPythonBindingsCodeCache

        with config.patch(dict(options)):
            CppPythonBindingsCodeCache.load_pybinding(["const float*"], NOTHING)

    if not config.cpp_cache_precompile_headers:
        yield
        return
    with ThreadPoolExecutor(1) as threads:
        threads.submit(copy_context().run, compile_nothing)  # with the settings of this thread
        yield


def compiler_facts() -> str:
    """Describe the compiler that inductor is prepared for: its command, its version, and what it compiles for.

    Raises:
        Unsupported: CXX names no program, or one that does not start or says nothing for ANSWER_SECONDS.
    """
    from torch._inductor import config

    command = _command()
    ask = [*command, "--version"]
    try:
        asked = subprocess.run(
            ask, capture_output=True, text=True, errors="replace", check=False, timeout=ANSWER_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unsupported(
            f"compiled needs a C++ compiler: {shlex.join(ask)} failed: {error} (CXX names another)"
        ) from error
    version = asked.stdout.partition("\n")[0] or f"exit code {asked.returncode}"
    march = "native" if config.cpp.march is None else config.cpp.march
    return f"{shlex.join(command)}: {version}; -march={march}"


def _command() -> list[str]:
    """Return the words of the compiler's command.

    Raises:
        Unsupported: its first word is no program.
    """
    named = os.environ.get("CXX") or "g++"
    if shutil.which(named):  # perhaps with spaces in its path
        return [named]
    try:
        words = shlex.split(named)
    except ValueError as error:
        raise Unsupported(f"compiled needs a C++ compiler: CXX is {named!r}: {error}") from error
    if not words or shutil.which(words[0]) is None:
        first = words[0] if words else repr(named)
        raise Unsupported(f"compiled needs a C++ compiler: {first} is not on the PATH (CXX names another)")
    return words


def _program(command: list[str]) -> str:
    """Return one program that runs `command`: inductor takes no arguments with it, nor spaces in its path.

    It lies in inductor's cache folder under the names of the command's programs, by which inductor knows compilers.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    if len(command) == 1 and _is_plain(command[0]):
        return command[0]
    script = f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n'
    name = "-".join(Path(word).name.replace(" ", "_") for word in command if not word.startswith("-"))
    program = Path(cache_dir(), f"kvbench-{hashlib.sha256(script.encode()).hexdigest()[:16]}", name)
    if not program.exists():
        program.parent.mkdir(parents=True, exist_ok=True)
        written = program.with_name(f"{os.getpid()}.part")
        written.write_text(script)
        written.chmod(0o755)
        written.replace(program)
    return str(program)


def _is_plain(path: str) -> bool:
    """Return whether `path` is one word of a command line without quotes, as which inductor writes it."""
    try:
        return shlex.split(path) == [path]
    except ValueError:  # half a pair of quotes
        return False


def _reason(error: Exception) -> str:
    """Return one line: a folder that cannot work, or what the compiler or the system said first."""
    from torch._inductor.exc import CppCompileError

    if not _is_plain(folder := os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")):  # which inductor sets, if nobody did
        return f"it cannot use the folder {folder!r}: set TORCHINDUCTOR_CACHE_DIR to a path without spaces and quotes"
    if not _is_plain(folder := str(Path(torch.__file__).parent)):
        return f"it cannot use torch from {folder!r}: install it in a path without spaces and quotes"
    output = error.output if isinstance(error, CppCompileError) else str(error) or type(error).__name__
    lines = [line for line in output.splitlines() if line.strip()] or ["it failed without a word"]
    return next((line for line in lines if "error" in line.lower()), lines[0])
