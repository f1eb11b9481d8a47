"""The file in the cache folder that holds which kernels are the fastest.

There is one for each processor, version of torch, number of threads, and C++ compiler.
"""

import hashlib
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock

from kvcache.compiled import candidates
from kvcache.compiled.compiler import compiler_facts
from kvcache.files import write_atomically
from kvcache.models.weight_cache import ModelError, cache_folder

Wanted = TypeVar("Wanted")

VERSION = 4
"""Of the file; raised where candidates change, or are timed in another way (1: one sum for all shapes)."""


def completed(
    wanted: Mapping[str, Wanted],
    choose: Callable[[dict[str, Wanted]], dict[str, tuple[str, dict[str, list[float]]]]],
) -> dict[str, str]:
    """Return the kernel of each product in `wanted`; `choose` finds those that the file lacks, which are then stored.

    `choose` returns the kernel of each, and the seconds of its candidates' passes. One process chooses at a time, and
    others wait for what it finds. A damaged file is made anew. Where it cannot be written, what was chosen is for this
    process alone, which stderr says, as it does of products that no time was left for: they keep their default.

    Raises:
        Unsupported: the C++ compiler does not say which one it is.
    """
    facts = compiler_facts()
    try:
        path = cache_folder() / f"kernels-{_platform_name(facts)}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(f"{path}.lock").acquire()
    except (OSError, ModelError) as error:
        _say_not_stored(error)
        return {name: kernel for name, (kernel, _) in choose(dict(wanted)).items()}
    with held:
        return _completed(path, facts, wanted, choose)


def _completed(
    path: Path, facts: str, wanted: Mapping[str, Wanted], choose: Callable[[dict[str, Wanted]], Any]
) -> dict[str, str]:
    document = _read(path, facts)
    kernels: dict[str, str] = document["kernels"]
    missing = {name: own for name, own in wanted.items() if name not in kernels}
    if missing:
        sys.stderr.write(f"kvbench: timing the kernels of {len(missing)} products, once on this processor\n")
        sys.stderr.flush()
        chosen = choose(missing)
        if untimed := [name for name, (_, times) in chosen.items() if not times]:
            sys.stderr.write(
                f"kvbench: no time was left for {len(untimed)} of them, which keep their default kernels; delete "
                f"{path} to time them again\n"
            )
        for name, (kernel, times) in chosen.items():
            kernels[name] = kernel
            fastest = {candidate: round(1e6 * min(seconds), 1) for candidate, seconds in times.items() if seconds}
            document["microseconds"][name] = dict(sorted(fastest.items(), key=lambda item: item[1]))
        try:
            write_atomically(path, json.dumps(document, indent=2).encode() + b"\n")
        except OSError as error:  # a full disk, say
            _say_not_stored(error)
    return {name: kernels[name] for name in wanted}


def _say_not_stored(error: Exception) -> None:
    sys.stderr.write(f"kvbench: the choice of kernels is not stored ({error}): set KVBENCH_CACHE\n")


def _read(path: Path, facts: str) -> dict[str, Any]:
    """Read the file; an empty one where there is none, or a damaged one."""
    about = {"version": VERSION, "processor": processor(), "compiler": facts}
    empty: dict[str, Any] = about | {"kernels": {}, "microseconds": {}}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        candidates.checked(document["kernels"], str(path))
    except (OSError, ValueError, KeyError, TypeError):
        return empty
    return document if document.keys() == empty.keys() and document["version"] == VERSION else empty


def processor() -> str:
    """Name the processor, as in `AMD EPYC 7763 family 25 model 1`; on Linux, and elsewhere as the system does."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    facts = dict(
        re.findall(r"^(model name|cpu family|model|CPU part)\s*: (.*)$", text.partition("\n\n")[0], re.MULTILINE)
    )
    found = [facts[name] for name in ("model name", "CPU part") if name in facts]
    found += [f"{word} {facts[name]}" for word, name in (("family", "cpu family"), ("model", "model")) if name in facts]
    return " ".join(found) or platform.processor() or platform.machine()


def _platform_name(facts: str) -> str:
    """Name what a choice holds for; the compiler's facts, which may be long, as a digest."""
    isa = torch.backends.cpu.get_cpu_capability()  # as ATEN_CPU_CAPABILITY limits it
    words = [processor(), isa, f"torch {torch.__version__}", f"t{torch.get_num_threads()}"]
    words += filter(None, map(os.environ.get, ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")))
    words.append(hashlib.sha256(facts.encode()).hexdigest()[:8])
    return "-".join(re.sub(r"[^\w.+]+", "_", word) for word in words)
