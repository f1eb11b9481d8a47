"""What the control groups of this process (a container, a job) leave it of the machine, in cgroup v1 and v2.

The limits of every group above count too: the least of them holds. Infinity stands for no limit.
"""

import math
import re
from pathlib import Path
from typing import NamedTuple


class Throttling(NamedTuple):
    """How often the CPU quota stopped the threads of these groups so far, and for how long, all threads together."""

    periods: int
    ns: int


def cpu_quota() -> float:
    """Return how many cores' worth of time may be used: 1.5 is 150 ms in each 100 ms."""
    return min((_quota(folder) for folder in _folders("cpu")), default=math.inf)


def memory_limit_bytes() -> float:
    """Return the most memory that the groups may hold."""
    return min((_memory_limit(folder) for folder in _folders("memory")), default=math.inf)


def free_memory_bytes() -> float:
    """Return how much more memory may be taken. File pages that nobody used lately are reclaimed on demand: free."""
    free = [math.inf]
    for folder in _folders("memory"):
        used = read_file(folder / "memory.current") or read_file(folder / "memory.usage_in_bytes")
        if used:
            # In v1 total_inactive_file is the whole group's; its inactive_file leaves out the groups below.
            stat = _numbers(folder / "memory.stat")
            reclaimable = stat.get("total_inactive_file", stat.get("inactive_file", 0))
            free.append(max(0, _memory_limit(folder) - int(used) + reclaimable))
    return min(free)


def groups_with_quota() -> list[Path]:
    """Return the folders of the groups that have a CPU quota, for `throttling`."""
    return [folder for folder in _folders("cpu") if _quota(folder) < math.inf]


def throttling(groups: list[Path]) -> Throttling | None:
    """Sum up what the quotas of `groups` did since each was made; None where there is no quota or no count of it."""
    stats = [stat for stat in (_numbers(folder / "cpu.stat") for folder in groups) if "nr_throttled" in stat]
    if not stats:
        return None
    # v2 counts microseconds, v1 nanoseconds.
    ns = sum(1000 * stat["throttled_usec"] if "throttled_usec" in stat else stat["throttled_time"] for stat in stats)
    return Throttling(periods=sum(stat["nr_throttled"] for stat in stats), ns=ns)


def _quota(folder: Path) -> float:
    in_two_files = f"{read_file(folder / 'cpu.cfs_quota_us')} {read_file(folder / 'cpu.cfs_period_us')}"  # v1
    quota, period = (read_file(folder / "cpu.max") or in_two_files).split()
    # Without a quota it is `max`, or -1, or there are no such files.
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else math.inf


def _memory_limit(folder: Path) -> float:
    limit = read_file(folder / "memory.max") or read_file(folder / "memory.limit_in_bytes")
    return int(limit) if limit and limit.isdigit() else math.inf


def _folders(controller: str) -> list[Path]:
    """Return the folders of this process's group and of all above it that can be seen, for `controller`.

    A container sees its groups from a root of its own: what lies above that is hidden, and a group outside of it shows
    no more than the root. The mounts say where the root is (proc_pid_mountinfo(5), cgroups(7)).
    """
    folders: list[Path] = []
    groups = [line.split(":", 2) for line in (read_file(Path("/proc/self/cgroup")) or "").splitlines()]
    for controllers, root, mount in _mounts():
        for _, own, group in groups:
            is_v2, both = controllers is None, (own.split(","), (controllers or "").split(","))
            if not (own == "" if is_v2 else all(controller in names for names in both)):
                continue
            inside = root in {group, "/"} or group.startswith(f"{root}/")
            below = Path(group.removeprefix(root).lstrip("/")) if inside else Path()
            path = mount / below if ".." not in below.parts else mount
            folders += [folder for folder in (path, *path.parents) if folder.is_relative_to(mount) and folder.is_dir()]
    return folders


def _mounts() -> list[tuple[str | None, str, Path]]:
    """Return each cgroup mount: its options (None for v2), the group that is its root, and where it is mounted."""
    found: list[tuple[str | None, str, Path]] = []
    for line in (read_file(Path("/proc/self/mountinfo")) or "").splitlines():
        place, _, kind = line.partition(" - ")
        root, mount = (re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), text) for text in place.split()[3:5])
        filesystem, *_, options = kind.split()
        if filesystem in {"cgroup", "cgroup2"}:
            found.append((None if filesystem == "cgroup2" else options, root, Path(mount)))
    return found


def _numbers(path: Path) -> dict[str, int]:
    """Return the lines `name number` of a file; none where it is missing."""
    return {name: int(value) for name, value in re.findall(r"^(\w+) (\d+)$", read_file(path) or "", re.MULTILINE)}


def read_file(path: Path, n_bytes: int = -1) -> str | None:
    """Return the contents of a small file of the kernel's, stripped; None where it is missing or refused."""
    try:
        with path.open("rb", buffering=0) as file:
            return file.read(n_bytes).decode(errors="replace").strip()
    except OSError:
        return None
