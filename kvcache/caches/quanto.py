"""transformers' QuantizedCache with optimum-quanto's integers."""

import functools
import os
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar

from filelock import FileLock
from transformers import Cache

from kvcache.caches.contract import Unsupported
from kvcache.caches.quantized import QuantizedKV

LEFT_BEHIND_S = 120.0
"""A build that wrote nothing for so long has ended: its two sources take half a minute on one busy core."""


class QuantoKV(QuantizedKV):
    """What optimum-quanto stores; a subclass for each number of bits that it has."""

    package: ClassVar[str] = "optimum-quanto"
    backend: ClassVar[str] = "quanto"

    def _empty(self) -> Cache:
        cache = super()._empty()  # refuses where the package is missing
        if self._model.device.type != "meta":  # a rehearsal computes nothing, so it need not wait for a compiler
            build_extension()
        return cache


@functools.cache
def build_extension() -> None:
    """Compile quanto's C++ extension, unless that was done, one process at a time.

    quanto compiles at the first product, inside its own installation. torch's loader waits without end for a lock file
    there, which a process that was killed while it compiled (a worker past its time) leaves behind: such a file is
    removed here once nothing is written any more.

    Raises:
        Unsupported: it cannot be compiled; the message ends with the compiler's first line.
    """
    from optimum.quanto.library.extensions.extension import get_extension

    extension: Any = get_extension("quanto_cpp")
    build = Path(extension.build_directory)
    # One for each user: Linux lets nobody open another's file in a folder for all.
    name = f"kvbench-quanto-{getattr(os, 'getuid', int)()}.lock"
    with FileLock(Path(tempfile.gettempdir(), name)):
        while (build / "lock").exists():
            if time.time() - max(path.stat().st_mtime for path in [build, *build.iterdir()]) > LEFT_BEHIND_S:
                (build / "lock").unlink(missing_ok=True)
            else:
                time.sleep(0.2)
        try:
            extension.lib  # noqa: B018  # looking it up compiles it
        except (ImportError, OSError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise Unsupported(f"optimum-quanto cannot compile its extension here: {reason}") from error


class QuantoInt2(QuantoKV):
    """2 bits a number."""

    nbits: ClassVar[int] = 2


class QuantoInt4(QuantoKV):
    """4 bits a number."""

    nbits: ClassVar[int] = 4
