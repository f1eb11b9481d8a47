"""Frames -> figures. matplotlib is imported here first, without the user's settings for it.

Its import reads MPLBACKEND and a style file, and fails if either is wrong; no plot here depends on them.
"""

import logging
import os

_OWN = {"MPLBACKEND": "agg", "MATPLOTLIBRC": os.devnull}
_users = {name: os.environ.get(name) for name in _OWN}
logging.getLogger("matplotlib").setLevel(logging.ERROR)  # its remarks on style files and caches are nothing to act on
os.environ.update(_OWN)
try:
    import matplotlib as mpl  # noqa: F401
finally:
    for _name, _value in _users.items():
        if _value is None:
            del os.environ[_name]
        else:
            os.environ[_name] = _value
