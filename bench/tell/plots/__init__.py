"""Frames -> figures. matplotlib is imported here first, without the user's settings for it.

Its import reads MPLBACKEND and a style file, and fails if either is wrong; no plot here depends on them. A file
`matplotlibrc` in the current folder goes before all else: the import is made where it reads its own.
"""

import contextlib
import importlib.util
import logging
import os
from pathlib import Path

_OWN = {"MPLBACKEND": "agg", "MATPLOTLIBRC": os.devnull}
_users = {name: os.environ.get(name) for name in _OWN}
logging.getLogger("matplotlib").setLevel(logging.ERROR)  # its remarks on style files and caches are nothing to act on
os.environ.update(_OWN)
_spec = importlib.util.find_spec("matplotlib")
_its_own = Path(_spec.origin).parent / "mpl-data" if _spec is not None and _spec.origin else Path()
try:
    # Not Path.exists: where the current folder may not be searched there is no such file, and that is no error.
    with contextlib.chdir(_its_own) if os.access("matplotlibrc", os.F_OK) else contextlib.nullcontext():
        import matplotlib as mpl  # noqa: F401
finally:
    for _name, _value in _users.items():
        if _value is None:
            del os.environ[_name]
        else:
            os.environ[_name] = _value
