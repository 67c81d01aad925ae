"""What a change did with numbers, links and names, as a reader of the page in headless Chromium sees it."""

from __future__ import annotations

import pytest
from viewer_chromium import CHROMIUM

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, chromium-browser or google-chrome on the PATH"),
    pytest.mark.timeout(300),
]


def test_numbers_links_and_names_are_followed_through_a_change(show):
    rows = [
        {"id": "a", "before": "In 1,867 she came to Warsaw with Pierre, see https://a.b/c",
         "after": "1. Warsaw: she came there in 1867.\n 12) The year after, in 1868, see https://a.b/c and ask Marie",
         "task": "open_qa", "status": "rewrite", "rejected by": None},
        {"id": "b", "before": "Two.", "after": "Two.", "task": "math", "status": "original", "rejected by": "length"},
    ] * 3  # fmt: skip
    tab = show(rows, hash="#row=0", score=None, text=("before", "after"), facts=True)
    tab.wait("document.querySelector('#detail .facts')")
    marked = "[...document.querySelectorAll('#detail .words .fact.{}')].map(e => e.textContent)"
    assert tab.js("document.querySelector('#detail .facts').textContent") == (
        "numbers, links and names: 3 keptlost: Pierrenew: 1868, Marie"
    )
    assert set(tab.js(marked.format("kept"))) == {"1,867", "1867", "Warsaw", "https://a.b/c"}
    assert set(tab.js(marked.format("lost"))) == {"Pierre"}
    assert set(tab.js(marked.format("fresh"))) == {"1868", "Marie"}
    text = "[...document.querySelectorAll('#detail .words > *')].length"
    assert tab.js(text) > 3
    words = tab.js("document.querySelector('#detail .words').cloneNode(true).textContent")
    for part in ("In 1,867 she", "Warsaw: she", "in 1868, see"):
        assert part.split()[-1] in words
    assert "Warsaw" in tab.js("[...document.querySelectorAll('#detail .words .kept')].map(e => e.title).join()")
    assert tab.js("document.querySelectorAll('#filters').length") == 1
    for name in ("task", "status", "rejected by"):
        assert name in tab.js("document.querySelector('#filters').textContent")


def test_a_page_without_facts_marks_none(show):
    tab = show([{"before": "In 1867", "after": "In 1868"}], hash="#row=0", score=None, text=("before", "after"))
    tab.wait("document.querySelector('#detail ins')")
    assert tab.js("document.querySelectorAll('.fact').length") == 0
