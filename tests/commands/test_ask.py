"""The question on a terminal: y, n, Ctrl-C, and none at all where there is no terminal."""

import contextlib
import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios

import pytest

PROGRAM = [sys.executable, "-c", "from bench.commands.output import ask; print(ask('Cancel the jobs?'))"]


def on_its_own_terminal() -> None:
    """Make standard input the terminal whose Ctrl-C is a signal, which a parent in the background may ignore."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def read_until(descriptor: int, words: bytes) -> None:
    seen = b""
    while words not in seen:
        seen += os.read(descriptor, 1024)


def answered(process: "subprocess.Popen[str]", descriptor: int, typed: bytes) -> str:
    """Type until the process ends: Python does not see a Ctrl-C that comes just before it begins to read."""
    for _ in range(60):
        os.write(descriptor, typed)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=1)[0]
    process.kill()
    raise AssertionError(f"typed {typed!r} for a minute, and nothing was answered")


@pytest.mark.parametrize(
    ("typed", "answer"), [(b"y\n", "True"), (b"n\n", "False"), (b"\n", "False"), (b"\x03", "False")]
)
def test_the_answer_on_a_terminal(typed: bytes, answer: str) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        PROGRAM,
        stdin=theirs,
        stderr=theirs,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=on_its_own_terminal,  # noqa: PLW1509 - there is one thread
    )
    os.close(theirs)
    read_until(ours, b"Cancel the jobs? [y/N]:")
    assert answered(process, ours, typed).split() == [answer]  # click begins with a blank
    assert process.returncode == 0
    os.close(ours)


def test_nobody_is_asked_without_a_terminal() -> None:
    done = subprocess.run(PROGRAM, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("False\n", "")
