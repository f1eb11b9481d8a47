"""The environments of the study `environments`: each is a few variables, limits or places that somebody really has."""

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Command = Literal["run", "report", "gate", "ab"]
COMMANDS: tuple[Command, ...] = ("run", "report", "gate", "ab")

DONE: Mapping[Command, tuple[int, ...]] = {"run": (0,), "report": (0,), "gate": (0,), "ab": (0, 4)}
"""Exit codes of the README where nothing is wrong: times of a tiny model may well be undecided."""


@dataclass(frozen=True, kw_only=True)
class Refused:
    """What a command leaves with that cannot work here, and what its line names."""

    code: int
    says: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """An environment. In its texts {folder} is a folder of its own, {other} another repository, {tree} this one."""

    name: str
    variables: Mapping[str, str | None] = field(default_factory=dict)
    """None: unset."""
    setup: str = ""
    """Shell commands before kvbench, as in `ulimit -n 64`."""
    redirect: str = ""
    """What the shell does with its output, as in `>&-`."""
    prefix: tuple[str, ...] = ()
    """A program that starts kvbench, as taskset."""
    inside: str = ""
    """Below the folder of its own, where run folders are and are made: a name that somebody chose."""
    here: str = "{folder}/here"
    commands: tuple[Command, ...] = ("run", "report", "gate")
    refused: Mapping[Command, Refused] = field(default_factory=dict)
    silent: bool = False
    """Whether stdout does not arrive, so that no table can be looked for."""
    cores: int | None = None
    """Cores that a run must have found, where they differ from this process's."""
    skip: Callable[[], str | None] = lambda: None
    """Why it cannot be tried here, or None."""


def needs_root(program: str) -> Callable[[], str | None]:
    """Make the reason for leaving a row out where this is not root, or there is no such program."""

    def reason() -> str | None:
        if os.getuid():
            return "only root may"
        return None if shutil.which(program) else f"no {program} here"

    return reason


def cannot_mount() -> str | None:
    """Find out whether a small file system can be mounted."""
    if reason := needs_root("mount")():
        return reason
    script = "d=$(mktemp -d) && mount -t tmpfs -o size=1m tmpfs $d && umount $d && rmdir $d"
    tried = subprocess.run(["sh", "-c", script], check=False, capture_output=True)
    return "no mount allowed" if tried.returncode else None


NOBODY = (
    "setpriv",
    "--reuid=54321",
    "--regid=54321",
    "--clear-groups",
    "--inh-caps=+dac_override,+dac_read_search",
    "--ambient-caps=+dac_override,+dac_read_search",
)
"""A user without an entry in the password file, who can still read a Python in root's folder."""

GROUPS = Path("/sys/fs/cgroup")


def cannot_limit() -> str | None:
    """Find out whether the groups of cgroup v1 may be written."""
    if reason := needs_root("bash")():
        return reason
    return None if os.access(GROUPS / "cpu" / "tasks", os.W_OK) else "no cgroup v1 that may be written"


def in_a_group(controller: str, **limits: str) -> str:
    """Write the shell commands that put the shell into a group within a group of its own, and end both with it."""
    group = f"{GROUPS}/{controller}/kvbench-study-$$"
    values = "; ".join(f"echo {value} > {group}/{controller}.{name}" for name, value in limits.items())
    inner = f"echo 1 > {group}/cgroup.clone_children; mkdir {group}/inner"
    leave = f"echo $$ > {GROUPS}/{controller}/tasks; rmdir {group}/inner {group}"
    return f"mkdir {group}; {values}; {inner}; echo $$ > {group}/inner/tasks; trap '{leave}' EXIT"


def without(place: str) -> tuple[str, ...]:
    """Write the program that starts another where `place` is an empty file system, as in a bare container."""
    return ("unshare", "--mount", "sh", "-c", f'mount -t tmpfs tmpfs {place} && exec "$@"', "sh")


_BLOCKING = "from signal import *; pthread_sigmask(SIG_BLOCK, valid_signals())"
BLOCKED = ("python3", "-c", f"import os, sys; {_BLOCKING}; os.execv(sys.argv[1], sys.argv[1:])")
"""A program that starts another with every signal blocked."""

HIDDEN = Refused(code=2, says="random.py hides Python's own module random")
NO_CACHE = Refused(code=2, says="set KVBENCH_CACHE")

ROWS = (
    Row(name="plain", commands=COMMANDS),
    # Text and terminals.
    Row(name="locale-c", variables={"LC_ALL": "C"}, commands=COMMANDS),
    Row(name="ascii-only", variables={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, commands=COMMANDS),
    Row(name="missing-locale", variables={"LC_ALL": "xx_YY.UTF-8", "LANGUAGE": "de"}, commands=("run", "report", "ab")),
    Row(name="latin1-output", variables={"PYTHONIOENCODING": "latin-1"}),
    Row(name="40-columns", variables={"COLUMNS": "40", "LINES": "10"}),
    Row(name="dumb-terminal", variables={"TERM": "dumb"}),
    Row(name="no-color", variables={"NO_COLOR": "1"}, commands=("report", "gate")),
    Row(name="forced-color", variables={"FORCE_COLOR": "1", "CLICOLOR_FORCE": "1", "TTY_COMPATIBLE": "1"}),
    Row(name="stdout-closed", redirect=">&-", silent=True, commands=COMMANDS),
    Row(name="stderr-closed", redirect="2>&-", commands=COMMANDS),
    Row(name="both-closed", redirect=">&- 2>&-", silent=True),
    Row(name="stdin-closed", redirect="<&-"),
    Row(name="pipe-to-head", redirect="| head -1", silent=True),
    Row(
        name="full-device",
        redirect="> /dev/full",
        silent=True,
        refused={name: Refused(code=5, says="No space left") for name in ("run", "report", "gate")},
    ),
    Row(name="1-column", variables={"COLUMNS": "1", "LINES": "1", "FORCE_COLOR": "1", "TTY_COMPATIBLE": "1"}),
    Row(name="turkish", variables={"LC_ALL": "tr_TR.UTF-8", "LANGUAGE": "tr"}),
    # Signals.
    Row(name="nohup", setup="trap '' HUP"),
    Row(name="signals-ignored", setup="trap '' INT TERM HUP PIPE CHLD USR1", commands=COMMANDS),
    Row(name="signals-blocked", prefix=BLOCKED, commands=COMMANDS),
    # Plots.
    Row(name="backend-of-a-notebook", variables={"MPLBACKEND": "module://matplotlib_inline.backend_inline"}),
    Row(name="backend-tk", variables={"MPLBACKEND": "TkAgg", "DISPLAY": None}),
    Row(name="backend-unknown", variables={"MPLBACKEND": "nonsense"}),
    Row(
        name="matplotlibrc-latex",
        setup="echo 'text.usetex: True\nfont.family: No Such Font\nbackend: qtagg' > {folder}/rc",
        variables={"MATPLOTLIBRC": "{folder}/rc", "PATH": "/usr/bin:/bin"},
    ),
    Row(
        name="matplotlibrc-broken",
        setup="head -c 300 /dev/urandom > {folder}/rc",
        variables={"MATPLOTLIBRC": "{folder}/rc"},
    ),
    # Threads.
    Row(name="omp-1-thread", variables={"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}),
    Row(name="omp-64-threads", variables={"OMP_NUM_THREADS": "64", "OMP_DYNAMIC": "true"}),
    Row(name="omp-nonsense", variables={"OMP_NUM_THREADS": "many"}),
    Row(name="omp-bound", variables={"OMP_PROC_BIND": "close", "OMP_PLACES": "cores"}),
    Row(name="gomp-affinity", variables={"GOMP_CPU_AFFINITY": "0"}),
    Row(name="kmp-affinity", variables={"KMP_AFFINITY": "granularity=fine,compact,1,0"}),
    Row(name="omp-places", variables={"OMP_PLACES": "{{0}}", "OMP_PROC_BIND": "true", "OMP_STACKSIZE": "much"}),
    Row(name="one-core", prefix=("taskset", "-c", "0"), cores=1, commands=COMMANDS),
    Row(name="nice", prefix=("nice", "-n", "19")),
    # Homes, caches, temporary folders.
    Row(name="home-unset", variables={"HOME": None, "USER": None, "LOGNAME": None}, commands=COMMANDS),
    Row(
        name="home-read-only",
        variables={"HOME": "/proc", "KVBENCH_CACHE": None},
        commands=COMMANDS,
        refused={"run": NO_CACHE, "ab": NO_CACHE},
    ),
    Row(
        name="user-without-entry",
        prefix=NOBODY,
        variables={"HOME": None, "KVBENCH_CACHE": None},
        refused={"run": NO_CACHE},
        skip=needs_root("setpriv"),
    ),
    Row(name="xdg-cache-relative", variables={"XDG_CACHE_HOME": "a/cache", "XDG_CONFIG_HOME": "a/config"}),
    Row(
        name="tmpdir-1-mb",
        variables={"TMPDIR": "{folder}/small"},
        skip=cannot_mount,
        commands=COMMANDS,
        setup="mkdir -p {folder}/small; mount -t tmpfs -o size=1m tmpfs {folder}/small; "
        "trap 'umount --lazy {folder}/small' EXIT",
    ),
    Row(name="tmpdir-gone", variables={"TMPDIR": "{folder}/nowhere"}),
    Row(name="tmpdir-long", variables={"TMPDIR": f"{{folder}}/{'t' * 120}"}, setup="mkdir $TMPDIR", commands=COMMANDS),
    Row(name="read-only-folder", here="/proc/self"),
    Row(name="path-with-spaces", here="{folder}/a folder \u00fc", commands=COMMANDS),
    Row(name="names-of-a-shell", inside="a b'\"$x$(y)%s*[1]&;#|", commands=COMMANDS),
    Row(name="names-with-lines", inside="two\nlines\tand 'more'"),
    Row(name="names-long", inside="n" * 255),
    Row(name="symlinked-folder", setup="ln -sfn {folder}/here {folder}/link; cd {folder}/link", commands=COMMANDS),
    # Limits.
    Row(name="umask-077", setup="umask 077", commands=COMMANDS),
    Row(name="umask-000", setup="umask 000"),
    Row(
        name="umask-777",
        setup="umask 777",
        prefix=NOBODY,
        refused={name: Refused(code=2, says="umask 777") for name in ("run", "report", "gate")},
        skip=needs_root("setpriv"),
    ),
    Row(
        name="4-kb-files",
        setup="ulimit -f 4",
        commands=("run", "report"),
        refused={"run": Refused(code=5, says="File too large")},
    ),
    Row(name="64-open-files", setup="ulimit -n 64", commands=COMMANDS),
    Row(name="3-gb-of-addresses", setup="ulimit -v 3000000"),
    Row(name="1-gb-of-addresses", setup="ulimit -v 1000000", commands=("report", "gate")),
    Row(
        name="2-s-of-cpu",
        setup="ulimit -St 2",
        commands=("run",),
        refused={"run": Refused(code=143, says="terminated")},
    ),
    Row(name="small-stack", setup="ulimit -s 1024"),
    Row(name="cpu-quota-1.5", setup=in_a_group("cpu", cfs_quota_us="150000"), cores=1, skip=cannot_limit),
    Row(name="memory-limit-3-gb", setup=in_a_group("memory", limit_in_bytes="3000000000"), skip=cannot_limit),
    Row(name="cpuset-of-1", setup=in_a_group("cpuset", cpus="0", mems="0"), cores=1, skip=cannot_limit),
    Row(name="12-processes", setup=in_a_group("pids", max="12"), commands=("report", "gate"), skip=cannot_limit),
    Row(
        name="no-proc",
        prefix=without("/proc"),
        refused={"run": Refused(code=2, says="mount -t proc proc /proc")},
        skip=needs_root("unshare"),
    ),
    Row(name="no-sys", prefix=without("/sys"), skip=needs_root("unshare")),
    Row(
        name="folder-removed",
        setup="mkdir {folder}/gone; cd {folder}/gone; rmdir {folder}/gone",
        commands=COMMANDS,
        refused=dict.fromkeys(("run", "ab"), Refused(code=2, says="the current folder was removed")),
    ),
    # Repositories.
    Row(name="git-dir-leaked", variables={"GIT_DIR": "{other}/.git"}, commands=("run", "ab")),
    Row(
        name="git-of-a-hook",
        variables={"GIT_DIR": ".git", "GIT_INDEX_FILE": "{other}/.git/index", "GIT_PREFIX": ""},
        commands=("ab",),
    ),
    Row(
        name="git-of-another-user",
        variables={"GIT_TEST_ASSUME_DIFFERENT_OWNER": "1", "GIT_CONFIG_GLOBAL": "/dev/null"},
        commands=("run", "ab"),
        refused={"ab": Refused(code=2, says="dubious ownership")},
    ),
    # Python and libraries.
    Row(name="hash-seed", variables={"PYTHONHASHSEED": "7"}),
    Row(name="no-bytecode", variables={"PYTHONDONTWRITEBYTECODE": "1", "PYTHONSAFEPATH": "1", "PYTHONNOUSERSITE": "1"}),
    Row(
        name="another-bench",
        setup="mkdir {folder}/theirs; for name in bench kvcache case; do echo 1/0 > {folder}/theirs/$name.py; done",
        variables={"PYTHONPATH": "{folder}/theirs:{tree}"},
        commands=COMMANDS,
    ),
    Row(
        name="random-py-here",
        setup="echo MINE=1 > random.py; trap 'rm random.py' EXIT",
        variables={"PYTHONPATH": ":{tree}"},
        commands=COMMANDS,
        refused=dict.fromkeys(COMMANDS, HIDDEN),
    ),
    Row(name="optimized", variables={"PYTHONOPTIMIZE": "2"}),
    Row(name="warnings-as-errors", variables={"PYTHONWARNINGS": "error"}, commands=("report", "gate")),
    Row(name="unbuffered", variables={"PYTHONUNBUFFERED": "1", "PYTHONDEVMODE": "1"}, commands=("report", "gate")),
    Row(name="offline-hub", variables={"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HOME": "hub"}),
    Row(name="talkative-transformers", variables={"TRANSFORMERS_VERBOSITY": "debug", "TORCH_LOGS": "+dynamo"}),
    Row(
        name="hub-nonsense",
        variables={"HF_HOME": "/proc/nowhere", "HF_HUB_CACHE": "/dev/null", "TRANSFORMERS_VERBOSITY": "loud"},
    ),
    Row(name="gpu-nonsense", variables={"CUDA_VISIBLE_DEVICES": "nonsense", "NVIDIA_VISIBLE_DEVICES": "void"}),
    Row(name="time-zone-nonsense", variables={"TZ": ":no/where+99"}),
    Row(name="kathmandu", variables={"TZ": "Asia/Kathmandu"}),
    Row(name="step-summary-gone", variables={"GITHUB_STEP_SUMMARY": "/proc/nowhere"}, commands=("gate",)),
)
