"""What every test runs under: no hub, examples that CI repeats exactly, and skips that say why."""

import gc
import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.untraced import CasesWithoutNews, put_tracer_aside, tracer_aside

# Before any test imports transformers: nothing may depend on what a hub answers, or on how long it takes not to.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before any test imports torch: models of a few kilobytes gain nothing by threads, which on a busy machine wait for
# each other at every product (measured on two shared cores: 8 s, not over 280). Workers set their own number.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No deadline: the first example of a test pays for a model. In CI the examples are the same ones each time.
hypothesis.settings.register_profile("kvbench", deadline=None, derandomize="CI" in os.environ, print_blob=True)
hypothesis.settings.load_profile("kvbench")


def pytest_configure(config: pytest.Config) -> None:
    """Under --cov, leave untraced what runs no new line of ours: libraries, and cases that repeat others."""
    if config.pluginmanager.hasplugin("_cov"):
        put_tracer_aside()
        config.pluginmanager.register(CasesWithoutNews())


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Leave what is imported out of every garbage collection: each would walk through all of torch, 0.4 s of CPU."""
    gc.disable()
    with tracer_aside():
        result = yield
    gc.freeze()
    gc.enable()
    return result


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """Give torch back its number of threads after each test.

    A test that loads a worker in its own process sets it, and the tests that follow there, in whatever order, compute
    by other kernels: GPT-2 laid out anew gives the same logits to the bit on one thread, to rounding on two.
    """
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch is not None else int(os.environ["OMP_NUM_THREADS"])
    yield
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture(scope="session")
def love(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train the tutorial's model once: `kvbench train --out love` and nothing else, on one thread.

    Untraced by --cov: 3 steps of `test_own_text_is_cut_and_counted` run the same lines.
    """
    from bench.cli import main
    from tests.once import made_once
    from tests.untraced import without_tracer

    @without_tracer
    def train(folder: Path) -> None:
        with pytest.raises(SystemExit) as ended:
            main(["train", "--out", str(folder), "-t", "1"])
        assert ended.value.code == 0

    return made_once(tmp_path_factory, "love", train)


@pytest.fixture
def untraced() -> Iterator[None]:
    """Have torch.compile call its function as it is: a trace takes seconds, whatever the size of the model."""
    import torch

    with torch.compiler.set_stance("force_eager"):
        yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs a GPU, where there is none; leave out what measures time or compiles unless `-m` asks."""
    reason = why_no_cuda() if any("cuda" in item.keywords for item in items) else None
    if reason:
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))

    for mark in ("perf", "compiled"):
        left_out = [item for item in items if item.get_closest_marker(mark)]
        if left_out and mark not in config.option.markexpr:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if item not in left_out]


def why_no_cuda() -> str | None:
    """Why tests marked cuda cannot run here, or None if they can."""
    import torch

    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "no NVIDIA GPU that torch can use"
    return None
