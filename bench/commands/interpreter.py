"""Settings of Python itself, and signals, under which libraries cannot work: put right before a command begins."""

from __future__ import annotations

import locale
import os
import signal
import sys
import warnings
from contextlib import suppress

STRIPPED = 2
"""The level of optimisation (-OO) at which Python removes docstrings."""


def keep_docstrings() -> None:
    """Restart this program if Python was told to remove docstrings: help texts and transformers are made from them."""
    if sys.flags.optimize < STRIPPED:
        return
    words = [word for word in sys.orig_argv[1:] if word != "-OO"]
    if os.environ.pop("PYTHONOPTIMIZE", None) is not None or words != sys.orig_argv[1:]:
        os.execv(sys.executable, [sys.executable, *words])  # noqa: S606 - this very program


def settle() -> None:
    """Read files as UTF-8 in any locale, as transformers reads its own, and let no warning of a library be an error.

    The encoding of stdout and stderr stays the user's. Signals that the program before this one left blocked arrive
    again, and so does the end of a child process: where SIGCHLD is ignored, every git that fails would seem to succeed.
    """
    if hasattr(signal, "pthread_sigmask"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
    if locale.getencoding().lower() not in {"utf-8", "utf8"}:
        with suppress(locale.Error):
            locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
    if any(option.startswith("error") for option in sys.warnoptions):
        os.environ.pop("PYTHONWARNINGS", None)
        warnings.simplefilter("default")
        for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)  # as Python does by itself
