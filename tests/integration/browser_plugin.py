"""A page of a headless Chromium, for the tests that look at what a person would see."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    """A page of a headless Chromium; missing, it is a failure where PHI3_REQUIRE_BROWSER=1."""
    required = os.environ.get("PHI3_REQUIRE_BROWSER") == "1"
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None and not required:
        pytest.skip(f"no Chromium on this machine (looked for {', '.join(NAMES)})")
    if not required:
        pytest.importorskip("playwright", reason="playwright is not installed")
    from playwright.sync_api import sync_playwright

    assert browser is not None, f"PHI3_REQUIRE_BROWSER=1, and none of {NAMES} is installed"
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, headless=True, args=FLAGS)
        yield chromium.new_page(viewport={"width": 1280, "height": 800})
        chromium.close()
