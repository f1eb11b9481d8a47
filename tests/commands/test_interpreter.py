"""Settings of Python under which a library cannot work: each in a process of its own, since Python reads them once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.measure.server_process import worker_environment
from tests.commandline import ROOT, refused

SETTLE = "from bench.commands import interpreter; interpreter.settle();"


def printed(code: str, *flags: str, **variables: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    command = [sys.executable, *flags, "-c", code]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()


def test_files_are_read_as_utf8_in_any_locale() -> None:
    code = f"{SETTLE} import sys; print(open('/dev/null').encoding, sys.stdout.encoding)"
    assert printed(code, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0") == "UTF-8 ascii"
    assert worker_environment(1)["PYTHONUTF8"] == "1"


@pytest.mark.parametrize("option", ["error", "error::DeprecationWarning"])
def test_a_librarys_warning_is_no_error(option: str) -> None:
    code = f"{SETTLE} import os, warnings; warnings.warn('a', DeprecationWarning); warnings.warn('b'); print('went on')"
    for started in ({"PYTHONWARNINGS": option}, {}):
        flags = [] if started else ["-W", option]
        assert printed(f"{code}; assert 'PYTHONWARNINGS' not in os.environ", *flags, **started) == "went on"


@pytest.mark.parametrize("flags", [["-OO"], []])
def test_docstrings_are_kept(flags: list[str]) -> None:
    code = "from bench.commands import interpreter as i; i.keep_docstrings(); print(i.__doc__[:8], i.os.getenv('A'))"
    assert printed(code, *flags, A="b", **({} if flags else {"PYTHONOPTIMIZE": "2"})) == "Settings b"


def test_a_thread_that_is_refused_is_no_interruption() -> None:
    """OpenBLAS would send a SIGINT; the threads of workers are those of --threads all the same."""
    assert printed(f"{SETTLE} import os; print(os.environ['OPENBLAS_NUM_THREADS'])") == "1"
    assert printed(f"{SETTLE} import os; print(os.environ['OPENBLAS_NUM_THREADS'])", OPENBLAS_NUM_THREADS="3") == "3"
    assert worker_environment(2)["OPENBLAS_NUM_THREADS"] == "2"


def test_signals_arrive_whatever_the_program_before_this_one_did() -> None:
    code = "import signal, subprocess; signal.signal(signal.SIGCHLD, signal.SIG_IGN);"
    code += f"signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals()); {SETTLE}"
    code += "print(subprocess.run(['false']).returncode, signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    assert printed(code) == "1 set()"


@pytest.mark.parametrize("variable", ["HF_HUB_DOWNLOAD_TIMEOUT", "PATH"])
def test_a_library_that_refuses_a_variable_is_named(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site-packages" / "picky"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ValueError('invalid literal: ' + repr('a while'))")
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv(variable, "a while")
    monkeypatch.setattr("bench.cli.app", lambda *_, **__: __import__("picky"))
    advice = f"; {variable}=a while may be why" if variable == "HF_HUB_DOWNLOAD_TIMEOUT" else ""
    assert (
        refused("env") == f"kvbench: picky cannot be imported here (ValueError: invalid literal: 'a while'){advice}\n"
    )
