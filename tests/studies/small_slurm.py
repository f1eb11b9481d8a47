"""A real Slurm on one machine: a controller and several nodes under names of their own, in a temporary folder.

Needs Debian's slurm-wlm and munge, and root. No service of the system is used: every daemon is started from here, with
its own keys, sockets and ports, and ended by its process number.
"""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import psutil

PACKAGES = ("slurm-wlm", "munge")
START_S = 60.0

CONFIGURATION = """
ClusterName=kvbench
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
SlurmdTimeout=300
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def install() -> None:
    """Install Slurm with apt where it is not; its services are not started."""
    if all(shutil.which(program) for program in ("slurmctld", "slurmd", "munged", "sbatch")):
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise SystemExit(f"needs {' and '.join(PACKAGES)}: install them, or run this as root on Debian")
    subprocess.run(["apt-get", "update", "-qq"], check=True)
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    subprocess.run(
        ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES], check=True, env=environment
    )


class SmallSlurm:
    """A cluster of `names`, each a node with all of this machine's cores. Use as a context manager."""

    def __init__(self, folder: Path, names: tuple[str, ...]) -> None:
        self.folder, self.names = folder, names
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> SmallSlurm:
        try:
            self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in reversed(list(self._daemons)):
            self.end(name)

    def end(self, name: str) -> None:
        """End a daemon and all that it started, as the death of its node would."""
        daemon = self._daemons.pop(name)
        for process in [*self._steps(name), psutil.Process(daemon.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL if name in self.names else signal.SIGTERM)
        daemon.wait(timeout=30)

    def up(self, name: str) -> None:
        """Start a node that was killed."""
        self._daemon(name, "slurmd", "-D", "-N", name)
        self.command("scontrol", "update", f"NodeName={name}", "State=RESUME")

    def down(self, name: str) -> None:
        """Kill a node with what runs on it, and have the controller know."""
        self.end(name)
        self.command("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=killed")

    def command(self, *words: str) -> str:
        """Run one of Slurm's commands; return what it prints."""
        done = subprocess.run(words, capture_output=True, text=True, env=os.environ | self.environment, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(words)}: {done.stderr.strip()}")
        return done.stdout

    def running(self) -> dict[str, str]:
        """Return the number of the job that each busy node runs."""
        lines = self.command("squeue", "--noheader", "--array", "--states=RUNNING", "--format=%N %i").splitlines()
        return dict(line.split() for line in lines)

    def _steps(self, name: str) -> list[psutil.Process]:
        """Find what runs on a node, and Slurm's process above it, which is no child of the node's daemon."""
        found: dict[int, psutil.Process] = {}
        for process in psutil.process_iter(["environ"]):
            own = process.info["environ"] or {}
            if own.get("SLURMD_NODENAME") == name and own.get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    above = [parent for parent in process.parents() if parent.name() == "slurmstepd"]
                    found |= {each.pid: each for each in [*above, process]}
        return list(found.values())

    def _start(self) -> None:
        (self.folder / "state").mkdir(parents=True)
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        controller_port, *ports = free_ports(1 + len(self.names))
        text = CONFIGURATION.format(folder=self.folder, host=platform.node(), controller_port=controller_port)
        for name, port in zip(self.names, ports, strict=True):
            text += f"NodeName={name} NodeHostname={platform.node()} NodeAddr=127.0.0.1 Port={port}"
            text += f" CPUs={os.cpu_count()}\n"
        (self.folder / "slurm.conf").write_text(text, encoding="utf-8")
        files = {"socket": "socket", "key-file": "key", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
        own = [f"--{flag}={self.folder}/munge.{name}" for flag, name in files.items()]
        self._daemon("munged", "munged", "--force", "--foreground", *own)
        self._wait((self.folder / "munge.socket").exists, "munged")
        self._daemon("slurmctld", "slurmctld", "-D")
        for name in self.names:
            self._daemon(name, "slurmd", "-D", "-N", name)
        idle = lambda: self._states().count("idle") == len(self.names)  # noqa: E731
        self._wait(idle, "slurmctld with its nodes")

    def _states(self) -> list[str]:
        words = ["sinfo", "--noheader", "--Node", "--format=%t"]
        done = subprocess.run(words, capture_output=True, text=True, env=os.environ | self.environment, check=False)
        return done.stdout.split()

    def _daemon(self, name: str, *words: str) -> None:
        with (self.folder / f"{name}.out").open("wb") as output:
            self._daemons[name] = subprocess.Popen(
                words, stdout=output, stderr=output, env=os.environ | self.environment, start_new_session=True
            )

    def _wait(self, ready: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + START_S
        while not ready():
            ended = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            if ended or time.monotonic() > deadline:
                outputs = " ".join((self.folder / f"{name}.out").read_text() for name in ended or self._daemons)
                raise SystemExit(f"{what} did not start: {outputs[-2000:]}")
            time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    """Find ports that nothing listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
