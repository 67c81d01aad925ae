"""The page of `realign view` in headless Chromium: what a reader of rewritten answers sees and filters by."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import Command
from llm_server import Server, answer
from realign.cli import app
from rewriters import response_of, revised

sys.path.insert(0, str(Path(__file__).parents[3] / "shared/instruct-data/tests"))

from viewer_chromium import CHROMIUM, Browser, Tab

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, chromium-browser or google-chrome on the PATH"),
    pytest.mark.timeout(300),
]
said = Command(app).said


@pytest.fixture
def opened(room: Path, server: Server) -> Iterator[Any]:
    """The page of conversations of two answers, of which every second one is refused."""

    def script(call: Any) -> Any:
        old = response_of(call)
        return answer(revised("No." if "Yes" in old else f"In short:\n- {old.replace('1973', '1974')}"))

    server.script = script
    turns = [
        ("user", "Verify whether the claim is true: bees dance"),
        ("assistant", "Yes, as von Frisch saw in 1919."),
        ("user", "Verify whether it is true: he won a prize"),
        ("assistant", "He won the Nobel Prize in 1973."),
    ]
    rows = [{"id": n, "messages": [{"role": who, "content": text} for who, text in turns]} for n in range(6)]
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said("run", "in.jsonl", "--base-url", server.url, "--structured", "schema", "--turns", "all", "-n", 1,
         "--filters", "length", "-o", "out.jsonl")  # fmt: skip
    told = said("view", "out.jsonl", "-o", "page.html")
    assert (told["records"], told["answers"], told["rewritten"]) == (6, 12, 6)
    browser = Browser(room / "profile")
    try:
        tab = Tab(browser, room / "page.html", "#row=1")
        yield tab
        assert tab.errors() == []
    finally:
        browser.close()


def test_every_answer_is_a_row_to_filter_and_to_compare(opened: Any) -> None:
    tab = opened
    assert tab.text("#count").split(" ")[0] == "12"
    tab.wait("document.querySelector('#detail .facts')")
    detail = tab.text("#detail")
    for words in ("0, answer 2", "In short:", "lost: 1973", "new: 1974", "2 kept", "fact_verification"):
        assert words in detail, words
    for column in ("status", "rejected by"):
        assert tab.js(f"document.querySelectorAll('#facets [data-column=\"{column}\"] input').length") == 2, column
    tab.click("#facets [data-column=status] input")  # the first of them
    tab.wait("document.querySelector('#count').textContent.startsWith('6 ')")
    shown = set(tab.column(1))
    assert shown in ({"rewrite"}, {"original"})
    tab.click("#facets [data-column=status] input")
    tab.wait("document.querySelector('#count').textContent.startsWith('12')")
