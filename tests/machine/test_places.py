"""Temporary folders and caches, whatever the environment names as one: they work, or one line names the variable."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.errors import UsageError
from bench.fork_server import description
from bench.machine import places
from bench.measure import server_process
from bench.measure.server_process import TREE
from kvcache.models import ModelError, weight_cache
from tests import inline, stub_run
from tests.commandline import refused
from tests.stub_run import STUB
from tests.untraced import untraced_variables

NOBODY = 54321
"""A user id without an entry in the password file."""

RUN = ["-m", "random:tiny", "-p", "8", "-n", "4", "-t", "1"]
COMMANDS = {
    "run": ["run", *RUN, "-r", "1", "--strategies", "dynamic", "--no-ceilings"],
    "ab": ["ab", *RUN, "--strategies", "dynamic", "--head-env", "A=1"],
}


@pytest.fixture
def environment(monkeypatch):
    """Set and unset variables."""

    def set_variables(**variables: str | None) -> None:
        for name, value in variables.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)

    for name in (*places.XDG, *places.PLACES, "HOME"):  # so that what `settle` changes is undone
        set_variables(**{name: os.environ.get(name)})
    set_variables(KVBENCH_CACHE=None)
    return set_variables


def as_nobody() -> bool:
    """Whether this process may start one of another user, as root in many containers may."""
    if os.getuid() or shutil.which("setpriv") is None:
        return False
    who = ["setpriv", f"--reuid={NOBODY}", "--clear-groups", "--inh-caps=+dac_override", "--ambient-caps=+dac_override"]
    return subprocess.run([*who, sys.executable, "-c", ""], capture_output=True, check=False).returncode == 0


def test_a_relative_place_is_the_same_for_every_process(environment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ("KVBENCH_CACHE", "MPLCONFIGDIR", "HF_HOME", "TORCHINDUCTOR_CACHE_DIR", "TMPDIR")
    environment(**dict.fromkeys(names, "some/where"), XDG_CACHE_HOME="relative", XDG_CONFIG_HOME="", HOME="relative")
    places.settle()
    assert {os.environ[name] for name in names} == {str(tmp_path / "some" / "where")}
    assert "XDG_CACHE_HOME" not in os.environ  # the specification has it ignored
    assert "HOME" not in os.environ  # the password file knows better
    assert not any(tmp_path.iterdir())


def test_absolute_places_stay(environment, tmp_path):
    environment(KVBENCH_CACHE=str(tmp_path), XDG_CACHE_HOME=str(tmp_path), HOME=str(tmp_path), TMPDIR=None)
    before = dict(os.environ)
    places.settle()
    assert dict(os.environ) == before


@pytest.mark.parametrize(("umask", "user"), [(0o777, NOBODY), (0o277, NOBODY), (0o777, 0), (0o077, NOBODY)])
def test_a_umask_that_takes_the_users_own_rights_is_refused(umask, user, environment, monkeypatch):
    monkeypatch.setattr(places.os, "geteuid", lambda: user)
    before = os.umask(umask)
    try:
        if umask & 0o700 and user:
            with pytest.raises(UsageError, match=rf"umask {umask:o}: .* as in `umask 022`"):
                places.settle()
        else:
            places.settle()
    finally:
        assert os.umask(before) == umask


def test_without_a_home_folder_nothing_is_made_here(environment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.path.expanduser", lambda path: os.environ.get("HOME") or path)  # as without an entry
    environment(HOME=None, XDG_CACHE_HOME=None)
    places.settle()
    with pytest.raises(ModelError, match="set KVBENCH_CACHE to a folder"):
        weight_cache.require("random-tiny-")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("relative", ["cache", "./cache", "../cache"])
def test_a_relative_xdg_cache_home_is_ignored_in_the_library_too(environment, relative):
    environment(XDG_CACHE_HOME=relative)
    assert weight_cache.cache_folder() == Path.home() / ".cache" / "kvbench"


def test_a_cache_that_cannot_be_written_serves_what_it_holds(environment, tmp_path):
    environment(KVBENCH_CACHE=str(tmp_path / "file" / "cache"))
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match=r"cannot write .*file/cache.*set KVBENCH_CACHE"):
        weight_cache.require("random-tiny-")
    cache = tmp_path / "cache"
    (cache / "random-tiny-seed0").mkdir(parents=True)
    environment(KVBENCH_CACHE=str(cache))
    weight_cache.require("random-tiny-")
    assert [path.name for path in cache.iterdir()] == ["random-tiny-seed0"]


def test_temporary_files_without_room(monkeypatch):
    places.require_temporary_bytes(1)
    with pytest.raises(UsageError, match=r"need about 1000000000000.0 MB, .* free: set TMPDIR"):
        places.require_temporary_bytes(10**18)
    monkeypatch.setattr(places.tempfile, "tempdir", "/nowhere/at/all")
    with pytest.raises(UsageError, match=r"no temporary folder can be made .*set TMPDIR"), places.temporary_folder():
        pass


HOLD = """
import time
from bench.machine.places import temporary_folder
with temporary_folder() as folder:
    print(folder, flush=True)
    time.sleep(600)
"""


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(places.tempfile, "tempdir", str(tmp_path))
    unknown = tmp_path / "kvbench-of-something-else"
    unknown.mkdir()
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(TREE)}
    with subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True, env=environment) as holder:
        abandoned = Path(holder.stdout.readline().strip())
        with places.temporary_folder() as ours:
            assert abandoned.is_dir()  # in use
        holder.kill()
    assert abandoned.is_dir()
    monkeypatch.setattr(places.os, "geteuid", lambda: NOBODY)
    with places.temporary_folder():
        assert abandoned.is_dir()  # another user's
    monkeypatch.undo()
    monkeypatch.setattr(places.tempfile, "tempdir", str(tmp_path))
    with places.temporary_folder() as ours, places.temporary_folder() as another:
        assert {path.name for path in tmp_path.iterdir()} == {unknown.name, ours.name, another.name}
    assert [path.name for path in tmp_path.iterdir()] == [unknown.name]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_home_that_cannot_be_written_is_refused_before_anything_is_measured(
    command, environment, tmp_path, monkeypatch
):
    (tmp_path / "file").touch()
    environment(HOME=str(tmp_path / "file"), XDG_CACHE_HOME=None)
    monkeypatch.setattr(server_process, "PROGRAM", STUB)
    monkeypatch.setenv("STUB_FACTS", json.dumps(description("random:tiny")))  # as the server of an A/B finds it
    inline.use(monkeypatch)
    line = refused(*COMMANDS[command], "--out", str(tmp_path / "runs"))
    assert "--model random:tiny: cannot write" in line
    assert "set KVBENCH_CACHE" in line
    assert not (tmp_path / "runs").exists()


TWICE = """
import os, sys
import bench.tell.report
from bench.cli import main
from bench.measure import server_process
from tests.inline import InlineServers

bench.tell.report.write_plots = lambda report, derived: {}  # it takes longer than the rest
server_process.RunServers = InlineServers  # its worker imports torch a second time; the stub's is a process

def code():
    try:
        main(sys.argv[2:])
    except SystemExit as ended:
        return ended.code

assert code() == 2
os.environ["KVBENCH_CACHE"] = sys.argv[1]
sys.exit(code())
"""


@pytest.mark.skipif(not as_nobody(), reason="only root can start a process of another user, with util-linux's setpriv")
def test_a_user_without_an_entry_in_the_password_file(tmp_path):
    """Without a cache it is refused; with one it measures, and leaves nothing in the current folder.

    Measured twice: with torch by a worker in the same process, and by a stub in a process that a fork server forks.
    """
    here, marks = tmp_path / "here", tmp_path / "marks"
    for folder in (tmp_path, here, marks):
        folder.mkdir(exist_ok=True)
        folder.chmod(0o777)
    rights = "+dac_override,+dac_read_search"  # python itself may lie where only root reads
    user = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    as_user = ["setpriv", *user, f"--inh-caps={rights}", f"--ambient-caps={rights}"]
    gone = {"HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "TMPDIR", "KVBENCH_CACHE"}
    env = {name: value for name, value in untraced_variables().items() if name not in gone} | {"PYTHONPATH": str(TREE)}
    torch = [sys.executable, "-c", TWICE, str(tmp_path / "cache")]
    stub = [sys.executable, "-m", "tests.stub_run"]
    for program, own, refusals in (torch, {}, 1), (stub, stub_run.variables(marks, None), 0):
        words = [*COMMANDS["run"], "--out", str(tmp_path / f"runs-{refusals}")]
        done = subprocess.run(
            [*as_user, *program, *words],
            cwd=here,
            env=env | own,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("set KVBENCH_CACHE") == refusals
        assert not any(here.iterdir())


@pytest.fixture
def one_megabyte(tmp_path):
    """A file system of 1 MB."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here: only root may, and not in every container")
    yield small
    subprocess.run(["umount", "--lazy", str(small)], check=True)


def test_a_tmpdir_of_one_megabyte_is_refused_where_it_is_too_small(one_megabyte, tmp_path, monkeypatch, environment):
    words = ["run", "-m", "random:tiny", "-p", "8", "-n", "64", "-b", "64", "--strategies", "dynamic", "-t", "1"]
    environment(TMPDIR=str(one_megabyte))
    monkeypatch.setattr("tempfile.tempdir", None)  # as in a process that has just started
    inline.use(monkeypatch)
    line = refused(*words, "--out", str(tmp_path / "runs"))
    assert f"{one_megabyte} has 1.0 MB free: set TMPDIR" in line
    assert not (tmp_path / "runs").exists()
    monkeypatch.setattr("tempfile.tempdir", str(one_megabyte))
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "large").write_bytes(os.urandom(1 << 21))
    from tests.ab.test_worktrees import git, worktrees

    git(tmp_path / "repository", "init", "-q")
    git(tmp_path / "repository", "add", ".")
    git(tmp_path / "repository", "commit", "-q", "-m", "large")
    head = worktrees.commit(tmp_path / "repository", "HEAD", "BASE")
    for trees in (worktrees.snapshot(tmp_path / "repository"), worktrees.checkout(tmp_path / "repository", head)):
        with pytest.raises(UsageError, match=r"cannot be copied to .*set TMPDIR"), trees:
            pass
    assert not any(one_megabyte.glob("kvbench*"))
