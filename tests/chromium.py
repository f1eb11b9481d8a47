"""An installed chromium, driven by playwright; nothing is downloaded."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome")


def why_no_chromium() -> str | None:
    """Say why no page can be looked at here, or None."""
    try:
        import playwright  # noqa: F401
    except ImportError:
        return "playwright is not installed"
    return None if any(map(shutil.which, NAMES)) else "no chromium is installed (nox -s browser installs Debian's)"


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start the browser; without its sandbox, which root and containers do not have."""
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, NAMES)))
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(
    browser: Browser, file: Path, *, width: int = 1280, scheme: Literal["light", "dark"] = "light"
) -> Iterator[tuple[Page, list[str]]]:
    """Open a file as a page of its own; the list holds what went wrong: errors, messages and requests of the page."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, wrong = context.new_page(), list[str]()

    def requested(url: str) -> None:
        if url != file.as_uri():
            wrong.append(url)

    page.on("console", lambda message: wrong.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on("request", lambda request: requested(request.url))
    try:
        page.goto(file.as_uri())
        yield page, wrong
    finally:
        context.close()
