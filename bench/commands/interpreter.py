"""Settings of Python itself, and signals, under which libraries cannot work: put right before a command begins."""

import gc
import locale
import os
import signal
import sys
import traceback
import warnings
from contextlib import suppress

STRIPPED = 2
"""The level of optimisation (-OO) at which Python removes docstrings."""

LIBRARIES_READ = ("HF_", "PYTORCH_", "SAFETENSORS_", "TORCH", "TRANSFORMERS_")
"""How the names of variables begin that libraries read when they are imported."""


def keep_docstrings() -> None:
    """Restart this program without -OO, which removes docstrings: help texts and transformers are made from them."""
    if sys.flags.optimize < STRIPPED:
        return
    words = [word for word in sys.orig_argv[1:] if word != "-OO"]
    if os.environ.pop("PYTHONOPTIMIZE", None) is not None or words != sys.orig_argv[1:]:
        os.execv(sys.executable, [sys.executable, *words])  # noqa: S606 - this very program


COLLECTED_EVERY = 50_000
"""Objects that come to be before Python looks for garbage; with its own 700 a sixth of a report's time went there."""


def settle() -> None:
    """Read files as UTF-8 in any locale, as transformers reads its own, and let no warning of a library be an error.

    The encoding of stdout and stderr stays the user's. Signals that the program before this one left blocked arrive
    again, and so does the end of a child process: where SIGCHLD is ignored, every git that fails would seem to succeed.
    NumPy's OpenBLAS starts no thread: nothing here needs one, and where the system refuses it (`ulimit -u`) OpenBLAS
    sends this process a SIGINT, as if the user had interrupted. Garbage is looked for less often (`COLLECTED_EVERY`):
    libraries make objects that stay.
    """
    gc.set_threshold(COLLECTED_EVERY)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
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


def failed_import(error: Exception) -> str | None:
    """Describe an error that a library raised while it was imported; None for any other error.

    torch and transformers read variables then, and fail where one has no valid value: those are named.
    """
    modules = [frame.filename for frame in traceback.extract_tb(error.__traceback__) if frame.name == "<module>"]
    _, installed, path = modules[-1].rpartition("site-packages/") if modules else ("", "", "")
    if not installed:
        return None
    named = [
        f"{name}={value}"
        for name, value in os.environ.items()
        if name.startswith(LIBRARIES_READ) and value and value in str(error)
    ]
    advice = f"; {', '.join(named)} may be why" if named else ""
    return f"{path.partition('/')[0]} cannot be imported here ({type(error).__name__}: {error}){advice}"
