"""A headless Chromium, its windows, and a JupyterLab to look at."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from lab_server import Lab, run_lab

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium, or the reason why there is none."""
    sync_api = pytest.importorskip(
        "playwright.sync_api",
        reason="Playwright is missing: pip install -e '.[browser]'",
    )
    found = [path for name in NAMES if (path := shutil.which(name))]
    if not found:
        pytest.skip("Chromium is missing: apt-get install chromium, or Google Chrome")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found[0], args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def window(browser: Any) -> Iterator[Any]:
    """A fresh window, which remembers nothing of those before it."""
    context = browser.new_context(viewport={"width": 1280, "height": 1000})
    context.set_default_timeout(60_000)
    yield context.new_page()
    context.close()


@pytest.fixture(scope="session")
def shared_lab(browser: Any) -> Iterator[Lab]:
    with run_lab() as lab:
        yield lab


@pytest.fixture
def lab(shared_lab: Lab) -> Iterator[Lab]:
    """JupyterLab on a copy of the pages, without a running kernel."""
    yield shared_lab
    shared_lab.shut_down_kernels()
