"""Pages that must stay quiet, with no network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """visit(path, width=, scheme=): the page, opened offline. When the test ends, it must have asked for no other file
    and have written nothing on the console."""
    contexts, noise = [], []

    def open_page(path: Path, width: int = 1100, scheme: str = "light") -> Page:
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(5000)
        page.on("console", lambda message: noise.append(message.text))
        page.on("pageerror", lambda error: noise.append(str(error)))
        page.on("request", lambda request: allowed(request.url, path) or noise.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    # Reading a drawing back for a picture is slow, as the driver says; pages themselves never do.
    assert [line for line in noise if "GPU stall due to ReadPixels" not in line] == []


def allowed(url: str, path: Path) -> bool:
    return url == path.as_uri() or url.startswith(("data:", "blob:"))
