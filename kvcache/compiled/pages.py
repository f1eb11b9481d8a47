"""Memory of weights that are mapped from a file: taken out of the process where nobody needs it. Linux alone."""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
from pathlib import Path

from torch import Tensor


def leave_pages(weight: Tensor) -> None:
    """Take a weight out of this process's memory that is mapped from a file, and of which a copy has been made.

    Its mapping lives as long as any other tensor of that file, so without this a process would hold it twice. Nothing
    is lost: whoever still reads it reads the file again, and a mapping that was written to is left as it is.
    """
    if sys.platform != "linux" or weight.device.type != "cpu" or not weight.is_contiguous():
        return
    page = mmap.PAGESIZE
    start, end = weight.data_ptr(), weight.data_ptr() + weight.nbytes
    first, last = -(-start // page) * page, end // page * page  # what it shares with its neighbours stays
    if last > first and _is_as_in_its_file(first, last):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


def _is_as_in_its_file(first: int, last: int) -> bool:
    """Whether these addresses lie in one mapping of a file of which no page was written (proc(5), smaps)."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines():
        head = re.match(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ (\d+)\s+(/\S.*)?", line)
        if head is not None:
            low, high, inode, path = head.groups()
            inside = int(low, 16) <= first and last <= int(high, 16) and inode != "0" and path is not None
        elif inside and line.startswith("Anonymous:"):
            return int(line.split()[1]) == 0
    return False
