"""Runs git for the repository of a folder, whatever a hook or a shell leaked into the environment."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from bench.errors import UsageError

LEAKED = (
    "GIT_ALTERNATE_OBJECT_DIRECTORIES",
    "GIT_COMMON_DIR",
    "GIT_CONFIG",
    "GIT_DIR",
    "GIT_GRAFT_FILE",
    "GIT_IMPLICIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_INTERNAL_SUPER_PREFIX",
    "GIT_NO_REPLACE_OBJECTS",
    "GIT_OBJECT_DIRECTORY",
    "GIT_PREFIX",
    "GIT_REPLACE_REF_BASE",
    "GIT_SHALLOW_FILE",
    "GIT_WORK_TREE",
)
"""What `git rev-parse --local-env-vars` lists: git sets them for its hooks; they lead to another repository or index.
Not in it: GIT_CONFIG_COUNT and GIT_CONFIG_PARAMETERS, by which a container sets safe.directory and the like."""

SETTINGS = {
    "core.fsmonitor": "false",  # `git status` would start a daemon
    "core.hooksPath": os.devnull,
    "core.splitIndex": "false",  # its shared half is stored in the user's repository
    "submodule.recurse": "false",  # a submodule's own index and HEAD would be written
}


class GitFailed(UsageError):
    """Git refused; the message is its own reason, in one line."""


def git(folder: Path, *arguments: str, variables: Mapping[str, str] | None = None) -> str:
    """Run git in `folder` and return what it prints, without the last newline.

    It runs no hook, asks no question, and does not refresh the user's index.

    Raises:
        GitFailed: it failed, or there is no git.
    """
    settings = [part for name, value in SETTINGS.items() for part in ("-c", f"{name}={value}")]
    # GIT_TRACE and its kind print where the reason of a failure is looked for.
    environment = {
        name: value for name, value in os.environ.items() if name not in LEAKED and not name.startswith("GIT_TRACE")
    }
    environment |= {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "LANGUAGE": "en"} | dict(variables or {})
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *settings, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
    except OSError as error:
        raise GitFailed(f"git cannot be started ({error.strerror}): install it, or look at PATH") from error
    if done.returncode:
        raise GitFailed(_reason(os.fsdecode(done.stderr)) or f"git {arguments[0]} exits with {done.returncode}")
    return os.fsdecode(done.stdout).removesuffix("\n")


def _reason(errors: str) -> str:
    """Return git's own last lines as one: where a filter is missing, its last alone does not say so."""
    lines = dict.fromkeys(line.strip() for line in errors.splitlines() if line.strip())
    return "; ".join(list(lines)[-4:]).removeprefix("fatal: ")
