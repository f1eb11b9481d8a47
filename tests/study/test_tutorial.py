"""Every block of the tutorial runs in order and prints what stands below it; its figures are what its commands draw."""

import contextlib
import io
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from matplotlib.testing.compare import compare_images

from bench.cli import main

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "why-the-cache-is-exact.md"
TRAINING = "kvbench train --out love"


def blocks() -> Iterator[tuple[str, str, str | None]]:
    """Language, content, and the output that the page shows for it (None: none)."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    for (language, content), (next_language, following) in zip(found, [*found[1:], ("", "")], strict=True):
        if language != "text":
            yield language, content, following if next_language == "text" else None


def comparable(output: str) -> str:
    """Times, losses and threads are each machine's own, and so are the widths of their columns."""
    output = re.sub(r"\d+\.\d+|\d+ threads?", "#", output)
    return re.sub(r"[ -]+", " ", output.replace(":", "")).strip()


def ran(language: str, content: str, names: dict[str, object]) -> str:
    """Run a block; what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if language == "python":
            exec(compile(content, str(PAGE), "exec"), names)  # noqa: S102  # our own page
        else:
            for line in content.splitlines():
                program, *arguments = shlex.split(line)
                assert (language, program) == ("bash", "kvbench")
                with pytest.raises(SystemExit) as ended:
                    main([*arguments, "-t", "1"])  # a model this small gains nothing by threads
                assert ended.value.code == 0
    return printed.getvalue()


def test_every_block_prints_what_the_page_says(love: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for language, content, expected in blocks():
        if content.strip() == TRAINING:
            shutil.copytree(love, "love")  # the fixture has run this very command
            continue
        printed = ran(language, content, names)
        if expected is not None:
            assert comparable(printed) == comparable(expected), content
    figures = re.findall(r"\]\(why-the-cache-is-exact/(\w+\.png)\)", PAGE.read_text())
    assert sorted(figures) == sorted(path.name for path in (DOCS / PAGE.stem).iterdir())
    shutil.copy("love/loss.png", "loss.png")
    for name in figures:
        assert compare_images(str(DOCS / PAGE.stem / name), str(tmp_path / name), tol=8) is None
