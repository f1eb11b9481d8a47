"""What the control groups of this process (a container, a job) leave it of the machine, in cgroup v1 and v2.

The limits of every group above count too. Infinity stands for no limit.
"""

from __future__ import annotations

import math
import re
from pathlib import Path


def cpu_quota() -> float:
    """How many cores' worth of time may be used."""
    quotas = [math.inf]
    for folder in _folders("cpu"):
        in_two_files = f"{read_file(folder / 'cpu.cfs_quota_us')} {read_file(folder / 'cpu.cfs_period_us')}"  # v1
        quota, period = (read_file(folder / "cpu.max") or in_two_files).split()
        if quota.isdigit() and period.isdigit():  # else there is no quota: `max`, or -1
            quotas.append(int(quota) / int(period))
    return min(quotas)


def free_memory_bytes() -> float:
    """How much more memory may be taken. What is reclaimed on demand (file pages that nobody used lately) is free."""
    free = [math.inf]
    for folder in _folders("memory"):
        limit = read_file(folder / "memory.max") or read_file(folder / "memory.limit_in_bytes")
        used = read_file(folder / "memory.current") or read_file(folder / "memory.usage_in_bytes")
        if limit and limit.isdigit() and used:
            # In v1 total_inactive_file is the whole group's; its inactive_file leaves out the groups below.
            stat = read_file(folder / "memory.stat") or ""
            pages = dict(re.findall(r"^((?:total_)?inactive_file) (\d+)$", stat, re.MULTILINE))
            reclaimable = int(pages.get("total_inactive_file") or pages.get("inactive_file") or 0)
            free.append(max(0, int(limit) - int(used) + reclaimable))
    return min(free)


def _folders(controller: str) -> list[Path]:
    """Folders of this process's control group and of all above it, for `controller`, in cgroup v1 or v2.

    In a container the path may be the host's, of which only the top is mounted: missing folders are passed over.
    """
    folders = []
    for line in (read_file(Path("/proc/self/cgroup")) or "").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = Path("/sys/fs/cgroup") / controllers
        path = mount / group.lstrip("/")
        folders += [folder for folder in (path, *path.parents) if folder.is_relative_to(mount) and folder.is_dir()]
    return folders


def read_file(path: Path, n_bytes: int = -1) -> str | None:
    """Contents of a small file of the kernel's, stripped; None where it is missing or refused."""
    try:
        with path.open("rb", buffering=0) as file:
            return file.read(n_bytes).decode(errors="replace").strip()
    except OSError:
        return None
