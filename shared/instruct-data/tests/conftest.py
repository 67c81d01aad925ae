"""Makes the helper modules of this folder importable by its tests, and opens the viewer's pages in a browser."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from viewer_chromium import Browser, Tab

from instruct_data.viewer import write_page


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def show(browser, tmp_path):
    """Writes rows as a page and opens it; nothing may go wrong in the page, and nothing be loaded by it."""
    tabs = []

    def open_page(rows, hash="", before="", width=1400, **options):
        path = write_page(rows, tmp_path / "page.html", **({"title": "A page"} | options))
        tabs.append(Tab(browser, path, hash, before, width))
        return tabs[-1]

    yield open_page
    for tab in tabs:
        assert tab.errors() == []
        tab.close()
