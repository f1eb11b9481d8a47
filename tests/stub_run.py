"""`kvbench` with stub workers (stub_worker.py) and a plan that needs no model: the driver is real, torch is nowhere.

Run as a program (`python -m tests.stub_run run ...`), or have `start` do it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import cli
from bench.case import Sweep
from bench.machine.environment import TorchFacts, read_environment
from bench.manifest import CasePlan
from bench.measure import plan, run, server_process
from kvcache import models
from tests.handmade import make_plan

STUB = Path(__file__).with_name("stub_worker.py")


def start(arguments: Sequence[str], folder: Path, script: Mapping[str, Any] | None = None) -> subprocess.Popen[str]:
    """Start `kvbench ARGUMENTS` with stub workers that follow `script`; `folder` is for their marks."""
    own = {"PYTHONPATH": str(server_process.TREE), "STUB": json.dumps(script or {}), "STUB_FOLDER": str(folder)}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.stub_run", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=server_process.TREE,
        env=os.environ | own,
    )


def finish(arguments: Sequence[str], folder: Path, script: Mapping[str, Any] | None = None) -> tuple[int, str, str]:
    """Run it to its end: exit code, stdout, stderr."""
    process = start(arguments, folder, script)
    out, errors = process.communicate(timeout=120)
    return process.returncode, out, errors


def _plan(sweeps: Iterable[Sweep]) -> list[CasePlan]:
    return [make_plan(case) for sweep in sweeps for case in sweep.cases()]


def _main() -> None:
    """Run the command with what would import torch replaced."""
    server_process.PROGRAM = STUB
    plan.plan = _plan
    plan.memory_bytes = lambda plans: 0
    plan.temporary_bytes = lambda plans: 0
    models.weights_digest = lambda model, seed=0: "5f" * 32  # type: ignore[assignment]
    facts = TorchFacts(isa="stub", gpu=None, gpu_driver=None)
    vars(run)["read_environment"] = lambda: read_environment(facts)  # where `run` looks the name up
    cli.main()


if __name__ == "__main__":
    _main()
