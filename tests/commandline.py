"""The command line in a test: in this process, or in one of its own where that is what is tested."""

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest

from bench.cli import SIGNALS, main
from kvbench import hidden
from tests.untraced import untraced_variables

STRATEGIES = ["naive", "dynamic", "static", "hf-generate"]  # compiled would take its time
TINY = ["-m", "random:tiny", "-t", "1", "-p", "8,16", "-n", "4", "-r", "6", "--strategies", ",".join(STRATEGIES)]

ROOT = Path(__file__).resolve().parents[1]
BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('torch', 'transformers', 'accelerate', 'gguf', 'safetensors'):
            raise ImportError('blocked: ' + name)
sys.meta_path.insert(0, Blocker())
from bench.cli import main
main()
"""


class Printed(NamedTuple):
    stdout: str
    stderr: str


def kvbench(*arguments: str, code: int = 0) -> Printed:
    """Run the command in this process and check its exit code."""
    ended, printed = run_to_the_end(*arguments)
    assert ended == code, printed.stderr[-2000:]
    return printed


def run_to_the_end(*arguments: str) -> tuple[object, Printed]:
    """Run the command in this process; return its exit code, whichever it is, and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with _signals_kept(), redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
        main(list(arguments), hidden)
    return ended.value.code, Printed(out.getvalue(), err.getvalue())


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Put the handlers of signals back: a command that was stopped ignores them, and what comes after it would, too."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def refused(*arguments: str, code: int = 2) -> str:
    """Return the one line on stderr of a command that is refused before anything runs; stdout is empty."""
    printed = kvbench(*arguments, code=code)
    assert printed.stdout == ""
    assert len(printed.stderr.strip().splitlines()) == 1, printed.stderr
    return printed.stderr


def in_a_process(*arguments: str, code: int = 0, cwd: Path | None = None, blocked: bool = False) -> Printed:
    """Run the command in a process of its own, on request without torch; an error must never be a traceback."""
    command = [sys.executable, "-c", BLOCKED] if blocked else [sys.executable, "-m", "bench.cli"]
    done = subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=untraced_variables()
        | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])), "COLUMNS": "80"},
        check=False,
        timeout=300,
    )
    assert done.returncode == code, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    return Printed(done.stdout, done.stderr)
