"""A grid and settings from a file: `--config FILE`, or `[tool.kvbench]` in ./pyproject.toml, keyed by long flags."""

import difflib
import os
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from bench.errors import UsageError

ORIGIN = "bench.commands.config.origin"
"""Key of `context.meta`: parameter -> the file and table that set it."""
ONLY_ON_THE_LINE = {"config_file", "resume", "dry_run", "help"}
"""Parameters that a file does not set, since they are about one call."""


def read(context: typer.Context, file: Path | None) -> Path | None:
    """Make what `[tool.kvbench]` and then `file` say the defaults of the command's flags.

    Typer gives them to the parsers of the flags as if they stood on the command line, where a flag still wins.

    Raises:
        UsageError: a file cannot be read, a key is unknown, or a value has a type that no flag takes.
    """
    pyproject = Path("pyproject.toml")
    context.default_map = {}
    if os.path.isfile(pyproject):  # noqa: PTH113  # False where the current folder may not be searched
        tool = _table(_read(pyproject, "pyproject.toml"), "tool", "pyproject.toml: tool")
        _apply(context, _table(tool, "kvbench", "pyproject.toml: tool.kvbench"), "pyproject.toml [tool.kvbench]")
    if file is not None:
        _apply(context, _read(file, f"--config {file}"), str(file))
    return file


ConfigFile = Annotated[
    Path | None,
    Option(
        "--config", metavar="FILE", callback=read, is_eager=True, help="TOML file with a grid and settings, see above."
    ),
]


def given(context: typer.Context) -> set[str]:
    """Return the parameters that stand on the command line itself."""
    return {name for name in context.params if _source(context, name) == "COMMANDLINE"}


def flag_of(context: typer.Context, parameter: str) -> str:
    """Return the long flag of a parameter, as in `--n-prompt`."""
    return next(max(option.opts, key=len) for option in context.command.params if option.name == parameter)


def origin(context: typer.Context, parameter: str) -> str:
    """Return the file that set a parameter, with a colon; empty where no file did."""
    place = context.meta.get(ORIGIN, {}).get(parameter)
    return f"{place}: " if place and _source(context, parameter) == "DEFAULT_MAP" else ""


def _source(context: typer.Context, parameter: str) -> str:
    source = context.get_parameter_source(parameter)
    return "" if source is None else source.name


def _read(file: Path, place: str) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{place}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{place}: not a TOML file ({error})") from error


def _table(document: dict[str, Any], key: str, place: str) -> dict[str, Any]:
    table = document.get(key, {})
    if not isinstance(table, dict):
        raise UsageError(f"{place}: not a table; write [tool.kvbench] above its keys")
    return table


def _apply(context: typer.Context, values: dict[str, Any], place: str) -> None:
    options = {
        max(option.opts, key=len).removeprefix("--"): option
        for option in context.command.params
        if option.name not in ONLY_ON_THE_LINE
    }
    for key, value in values.items():
        if key not in options:
            near = difflib.get_close_matches(key, options, n=1)
            hint = f"did you mean {near[0]}?" if near else f"valid: {', '.join(options)}"
            raise UsageError(f"{place}: unknown key {key}; {hint}")
        option = options[key]
        is_switch = bool(getattr(option, "is_flag", False))
        if is_switch != isinstance(value, bool):
            raise UsageError(f"{place}: {key}: give {'true or false' if is_switch else 'a value, not true or false'}")
        assert context.default_map is not None
        context.default_map[option.name] = value if is_switch else _words(value, f"{place}: {key}")
        context.meta.setdefault(ORIGIN, {})[option.name] = place


def _words(value: Any, place: str) -> str:
    """Write the value as it would stand on the command line: typer then checks it as it checks that."""
    values = value if isinstance(value, list) else [value]
    if any(isinstance(one, bool) or not isinstance(one, str | int | float) for one in values):
        raise UsageError(f"{place}: give a string, a number, or a list of these")
    return ",".join(map(str, values))
