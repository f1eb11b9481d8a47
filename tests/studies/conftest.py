"""Options of the pytest-benchmark suite."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """What `nox -s perf -- --model ...` can choose."""
    group = parser.getgroup("kvbench")
    group.addoption("--model", default="random:tiny", help="Model spec, as in `kvbench run`.")
    group.addoption("--n-prompt", type=int, default=64, help="Prompt length, in tokens.")
    group.addoption("--n-gen", type=int, default=8, help="Tokens to emit, at least 2.")
