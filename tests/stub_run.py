"""`kvbench` with stub workers (stub_worker.py) and a plan that needs no model: the driver is real, torch is nowhere.

Run it to its end in this process (`finish`), or in one of its own that can be killed (`start`).
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bench import cli
from bench.case import Sweep
from bench.machine.environment import TorchFacts, read_environment
from bench.manifest import CasePlan
from bench.measure import cluster, jobs, plan, run, server_process
from bench.tell import report
from kvcache import models
from tests.handmade import make_plan

STUB = Path(__file__).with_name("stub_worker.py")


def variables(folder: Path, script: Mapping[str, Any] | None) -> dict[str, str]:
    """What the stub workers read from their environment; `folder` is for their marks."""
    return {"STUB": json.dumps(script or {}), "STUB_FOLDER": str(folder)}


def start(
    arguments: Sequence[str], folder: Path, script: Mapping[str, Any] | None = None, *, killed: bool = False
) -> subprocess.Popen[str]:
    """Start `kvbench ARGUMENTS` with stub workers that follow `script`; untraced if it is to be killed."""
    from tests.untraced import untraced_variables  # brings pytest, which the process started does without

    own = {"PYTHONPATH": str(server_process.TREE)} | variables(folder, script)
    return subprocess.Popen(
        [sys.executable, "-m", "tests.stub_run", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=server_process.TREE,
        env=(untraced_variables() if killed else os.environ) | own,
    )


def finish(arguments: Sequence[str], folder: Path, script: Mapping[str, Any] | None = None) -> tuple[object, str, str]:
    """Run it to its end in this process: exit code, stdout, stderr."""
    import pytest  # `start` does without

    from tests.commandline import run_to_the_end

    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables(folder, script).items():
            patch.setenv(name, value)
        _replace(patch.setattr)
        code, printed = run_to_the_end(*arguments)
    return code, printed.stdout, printed.stderr


def _plan(sweeps: Iterable[Sweep]) -> list[CasePlan]:
    return [make_plan(case) for sweep in sweeps for case in sweep.cases()]


def _replace(put: Callable[[Any, str, Any], None]) -> None:
    """Replace what would import torch; and the plots, which take longer than all the rest."""
    facts = TorchFacts(isa="stub", gpu=None, gpu_driver=None)
    put(server_process, "PROGRAM", STUB)
    put(cluster, "PROGRAM", [sys.executable, "-m", "tests.stub_run"])
    put(plan, "plan", _plan)
    put(plan, "describe", lambda model, attention: SimpleNamespace(cautions=()))
    put(plan, "memory_bytes", lambda plans: 0)
    put(plan, "temporary_bytes", lambda plans: 0)
    put(models, "weights_digest", lambda model, seed=0: "5f" * 32)
    for module in (run, jobs):
        put(module, "read_environment", lambda: read_environment(facts))
    put(report, "write_plots", lambda report, derived: {})


if __name__ == "__main__":
    sys.modules |= {"torch": None, "transformers": None}  # type: ignore[dict-item]  # whoever imports them fails
    _replace(setattr)
    cli.main()
