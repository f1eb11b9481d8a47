"""What the machine and its software are, as a run stores them."""

import importlib.metadata
import math
import os
import platform
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from bench.machine import cgroup
from bench.machine.affinity import binding, unbind, usable_cores, user_variables
from bench.machine.cgroup import read_file
from bench.machine.cpu import CPUS, Cpu, isa, machine_memory
from bench.machine.cuda import gpu_driver, gpu_name
from bench.machine.git import GitFailed, git
from bench.manifest import Environment


class TorchFacts(NamedTuple):
    """Facts of the machine that only torch knows."""

    isa: str
    gpu: str | None
    gpu_driver: str | None


def read_torch_facts() -> TorchFacts:
    """Ask torch, which this imports, for the widest vector instructions and the current GPU."""
    gpu = gpu_name()
    return TorchFacts(isa=isa(), gpu=gpu, gpu_driver=gpu_driver() if gpu is not None else None)


def read_environment(torch_facts: TorchFacts | None = None) -> Environment:
    """Describe this machine and its software, as seen from this process.

    Takes 0.2 s, and the import of torch unless a process that has it already (a worker) gives the `torch_facts`.

    Raises:
        UsageError: as `machine_memory`.
    """
    facts = torch_facts or read_torch_facts()
    bound, variables = unbind(), user_variables()
    quota, limit = cgroup.cpu_quota(), cgroup.memory_limit_bytes()
    memory_bytes = machine_memory().total
    cpu = _cpuinfo()
    return Environment(
        hostname=machine_name(),
        os=platform.platform(),
        cpu_model=str(cpu.get("brand_raw") or platform.processor() or platform.machine()),
        cores=usable_cores(),
        isa=facts.isa,
        l3_bytes=Cpu().last_level_cache_bytes(),
        memory_bytes=memory_bytes,
        python=platform.python_version(),
        torch=importlib.metadata.version("torch"),
        transformers=importlib.metadata.version("transformers"),
        gpu=facts.gpu,
        gpu_driver=facts.gpu_driver,
        git_commit=git_commit(),
        load_1min=psutil.getloadavg()[0],
        governor=read_file(CPUS / "cpu0/cpufreq/scaling_governor"),
        transparent_hugepage=_transparent_hugepage(),
        kvbench=importlib.metadata.version("kvbench"),
        cpu_quota=quota if quota < math.inf else None,
        memory_limit_bytes=int(limit) if limit < memory_bytes else None,
        bound_cores=sorted(bound) if bound else None,
        bound_by=binding(variables) if bound else None,
        thread_variables=variables,
    )


def machine_name() -> str:
    """Return the name of this machine: what the user calls it, its name in Slurm, or the host name.

    In a container the host name changes with every start, so `KVBENCH_MACHINE` can give that of the node.
    """
    return os.environ.get("KVBENCH_MACHINE") or os.environ.get("SLURMD_NODENAME") or platform.node()


@cache
def _cpuinfo() -> dict[str, Any]:
    """py-cpuinfo's findings; cached, since it starts other programs."""
    import cpuinfo

    return dict(cpuinfo.get_cpu_info())


def _transparent_hugepage() -> str | None:
    chosen = re.search(r"\[(\w+)\]", read_file(Path("/sys/kernel/mm/transparent_hugepage/enabled")) or "")
    return chosen[1] if chosen else None


def git_commit() -> str | None:
    """Return the current folder's commit, `+` where tracked files differ; None outside a repository or without git."""
    try:
        here = Path.cwd()
        commit = git(here, "rev-parse", "--verify", "HEAD")
        return f"{commit}+" if git(here, "status", "--porcelain", "--untracked-files=no") else commit
    except (GitFailed, FileNotFoundError):  # the current folder may have been removed
        return None
