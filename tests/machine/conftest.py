"""Kernel files that a test writes, in place of this machine's."""

from pathlib import Path

import pytest

from bench.machine import cgroup, covariates, cpu, cuda, environment

MOUNTS = """\
30 23 0:26 / /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
23 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw
"""
"""Both versions of control groups, in the usual places; what /proc/self/cgroup names decides which are used."""


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Write kernel files under a folder that stands in for the root; absolute paths are looked up there."""

    class Rooted(type(Path())):
        def __new__(cls, *parts: str):
            path = Path(*parts)
            return tmp_path / path.relative_to("/") if path.is_absolute() else path

    for module in (cgroup, covariates, cpu, cuda, environment):
        monkeypatch.setattr(module, "Path", Rooted)
    for module in (cpu, environment):
        monkeypatch.setattr(module, "CPUS", tmp_path / "sys/devices/system/cpu")

    def write(contents: dict[str, str]) -> None:
        if "/proc/self/cgroup" in contents:
            contents = {"/proc/self/mountinfo": MOUNTS} | contents
        for name, text in contents.items():
            path = tmp_path / name.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write
