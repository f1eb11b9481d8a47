"""The command `kvbench`: its commands, its signals, and an exit code for every error.

torch and transformers are imported only inside the commands that run a model.
"""

import errno
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Annotated, NoReturn

import typer

from bench.commands import config, flags, interpreter, streams, values
from bench.commands.ab import ab
from bench.commands.collect import collect
from bench.commands.env import env
from bench.commands.exchange import export, import_
from bench.commands.fit import fit
from bench.commands.gate import gate, promote
from bench.commands.gate import history as baseline_history
from bench.commands.history import history
from bench.commands.job import job
from bench.commands.report import compare, report
from bench.commands.run import run
from bench.commands.study import generate, trace, train
from bench.errors import FailedRun, KvbenchError, UsageError
from bench.machine import places

EXIT_INTERRUPTED, EXIT_TERMINATED = 130, 143

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGXCPU") if hasattr(signal, name)]
"""What ends a command in order: Ctrl-C, a scheduler, a terminal that is closed, `ulimit -t`."""

app = typer.Typer(
    name="kvbench",
    help="""Measure what a KV cache buys: generation without and with it, side by side.

    \b
    Examples:
      kvbench run --preset smoke            a first table, about a minute
      kvbench run                           the full measurement
      kvbench run -m DIR -p 64,256 -n 16    your own model and grid
      kvbench report RUN                    its table and plots again
      kvbench gate RUN --baseline PATH      a verdict for CI
      kvbench COMMAND --help                more examples
    """,
    epilog="Exit codes: 0 done or passed, 1 regression, 2 bad input, 3 stored data missing, damaged or not "
    "comparable, 4 inconclusive, 5 a case failed, 130/143 interrupted.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
baseline = typer.Typer(help="Set a baseline, and look at its drift.", rich_markup_mode=None)

app.command(epilog=flags.below_the_flags())(run)
for command in (report, compare, history, gate, ab, job, collect, fit, generate, trace, train, env, export):
    app.command()(command)
app.command("import")(import_)
app.add_typer(baseline, name="baseline")
baseline.command()(promote)
baseline.command("history")(baseline_history)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"kvbench {version('kvbench')}")
        raise typer.Exit


@app.callback()
def kvbench(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Take the flags before a command."""


class Stopped(BaseException):
    """One of `SIGNALS` came: end, keeping what was measured. Its notes say what that is."""

    def __init__(self, number: int) -> None:
        super().__init__("interrupted" if number == signal.SIGINT else "terminated")
        self.exit_code = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_TERMINATED


Hidden = Callable[[], str | None]
"""Names a file that hides a module of Python's own; None where none does."""


def main(arguments: list[str] | None = None, hidden: Hidden = lambda: None) -> NoReturn:
    """Run the command; every error that a user can cause is one line on stderr and an exit code of the contract."""
    if arguments is None:
        interpreter.keep_docstrings()
    for number in SIGNALS:
        if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:  # nohup has SIGHUP ignored
            signal.signal(number, _stopped)
    interpreter.settle()
    with streams.lasting_streams() as out:
        code = _run(sys.argv[1:] if arguments is None else arguments, hidden)
        out.flush()
        if out.failure is not None:
            _complain(f"stdout: cannot be written ({out.failure.strerror})", out.failure, code)
            code = code or FailedRun.exit_code  # a verdict stands; a lost document must not pass for a printed one
    sys.exit(code)


def _run(arguments: list[str], hidden: Hidden) -> int:
    """Run the command and return its exit code; an error is one line on stderr."""
    try:
        places.settle()
        code = app(arguments or ["--help"], prog_name="kvbench", standalone_mode=False)
        if code == 1 and "-completion" in arguments[0]:  # typer knows no such shell; 1 would say regression
            code = UsageError.exit_code
    except KvbenchError as error:
        code = _complain(str(error), error, error.exit_code)
    except typer.TyperException as error:
        code = _complain(_refusal(error), error, UsageError.exit_code)
    except Stopped as stop:
        for number in SIGNALS:  # a second one would end this branch with a traceback
            signal.signal(number, signal.SIG_IGN)
        _end_children()
        code = _complain(str(stop), stop, stop.exit_code)
    except OSError as error:  # a full disk, a folder that went away: what was stored before is safe
        code = _failed_place(error)
    except UnicodeEncodeError as error:  # before anything is measured: what is stored begins with the arguments
        code = _complain(
            f"{error.object!r}: is no valid text in this locale, choose another name", error, UsageError.exit_code
        )
    except Exception as error:  # noqa: BLE001
        code = _unforeseen(error, hidden)
    return code if isinstance(code, int) else 0


def _failed_place(error: OSError) -> int:
    """Report what could not be written, read or started, and which of its reasons is the user's to change."""
    kind: type[KvbenchError] = UsageError if error.errno == errno.ENAMETOOLONG else FailedRun
    what = "starting a process (see ulimit -u)" if error.errno == errno.EAGAIN else "writing"
    said = f"{error.filename or what}: {error.strerror or error}"
    if error.errno == errno.ENOENT:  # importing transformers resolves a relative path
        try:
            places.current_folder()
        except UsageError as reason:
            said, kind = str(reason), UsageError
    return _complain(said, error, kind.exit_code)


def _unforeseen(error: Exception, hidden: Hidden) -> int:
    """Report an error that nobody thought of; it must not end with 1, which says regression."""
    if "KVBENCH_TRACEBACK" in os.environ:
        raise error
    name = f"{type(error).__name__}: {error}"
    with suppress(Exception):  # where no memory is left, looking for the reason may fail as well
        if reason := hidden():
            return _complain(f"{name}; {reason}", error, UsageError.exit_code)
        if reason := interpreter.failed_import(error):
            return _complain(reason, error, UsageError.exit_code)
    return _complain(f"{name} (set KVBENCH_TRACEBACK=1 to see where)", error, FailedRun.exit_code)


def _complain(message: str, error: BaseException, code: int) -> int:
    """Print the message and what was noted on the error, such as what is kept of a run; return `code`."""
    whole = "; ".join([message, *getattr(error, "__notes__", [])])
    print(f"kvbench: {' '.join(whole.split())}", file=sys.stderr)
    return code


def _refusal(error: typer.TyperException) -> str:
    """Say what cannot be parsed: the flag, what is wrong with its value, and where the help is."""
    message, context = error.format_message(), getattr(error, "ctx", None)
    parameter = getattr(error, "param", None)
    if isinstance(error, typer.BadParameter) and error.message and parameter is not None and context is not None:
        message = error.message
        if errors := getattr(error.__cause__, "errors", None):  # typer's own check, by pydantic, and not our parser's
            message = values.invalid(errors()[0]["input"], parameter)
        message = f"{config.origin(context, parameter.name)}{config.flag_of(context, parameter.name)} {message}"
    command = f"{context.info_name} " if context is not None and context.parent is not None else ""
    return f"{message.rstrip('.')}; see kvbench {command}--help"


def _end_children() -> None:
    """End all that still runs for this process: a worker whose start the signal cut off, a compiler of a library.

    A job of `--cluster local` goes on below submitit's process, which alone ends.
    """
    import psutil

    from bench.measure.worker_process import kill_tree

    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            kill_tree(child, below="submitit" not in " ".join(child.cmdline()))


def _stopped(number: int, _frame: FrameType | None) -> NoReturn:
    raise Stopped(number)


if __name__ == "__main__":
    main()
