"""A headless Chromium for tests of pages, and what a page does that it should not."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@contextmanager
def chromium() -> "Iterator[Browser]":
    """A browser; without one the test is skipped, and fails where CI is set: there it was not to be missing."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None or find_spec("playwright") is None:
        missing = "Chromium (apt-get install chromium)" if program is None else "playwright (pip install playwright)"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"pages are tried in a browser: install {missing}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Its sandbox needs namespaces, which containers often do not give.
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


def expect(what: Any) -> Any:
    """playwright's, which waits until what is said of a part of a page is true."""
    from playwright.sync_api import expect

    return expect(what)


@contextmanager
def page_of(browser: "Browser", address: str, **context: Any) -> "Iterator[tuple[Page, list[str]]]":
    """An empty page, and what has gone wrong with it so far: errors and warnings in its console, exceptions that it did
    not catch, and requests for anything but `address` (which are not let through).

    Args:
        browser: of `chromium`.
        address: how the URLs of its own server, or file, begin.
        context: of playwright's `new_context`: viewport, color_scheme.
    """
    problems: list[str] = []
    with browser.new_context(**context) as opened:
        page = opened.new_page()
        page.on("console", lambda said: problems.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: problems.append(str(error)))

        def only_own(route: Any) -> None:
            if route.request.url.startswith((address, "data:")):
                route.fallback()
            else:
                problems.append(f"asks for {route.request.url}")
                route.abort()

        opened.route("**/*", only_own)
        page.set_default_timeout(20_000)
        yield page, problems
