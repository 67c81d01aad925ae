"""The page of `reflection-tuning view` in headless Chromium: what a reader of reflections sees and filters by."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from commands import Command
from llm_server import Server, answer
from reflection_tuning.cli import app
from teachers import teaching

sys.path.insert(0, str(Path(__file__).parents[3] / "shared/instruct-data/tests"))

from viewer_chromium import CHROMIUM, Browser, Tab

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, chromium-browser or google-chrome on the PATH"),
    pytest.mark.timeout(300),
]
said = Command(app).said


def test_both_texts_are_compared_and_rows_are_filtered_by_task_and_reason(
    room: Path, data: str, server: Server
) -> None:
    refused = ("item 4?", "item 7?", "item 8?")
    server.script = lambda call: answer("no") if any(word in str(call.json) for word in refused) else teaching(call)
    said("reflect", data, "--base-url", server.url, "--structured", "schema", "--what", "v1", "-o", "reflected.jsonl")
    said("view", "reflected.jsonl", "--policy", "v1", "-o", "page.html")
    browser = Browser(room / "profile")
    try:
        tab = Tab(browser, room / "page.html", "#row=2")
        assert tab.text("#count").split(" ")[0] == "12"
        tab.wait("document.querySelectorAll('#detail .facts').length == 2")  # of instruction, and of answer
        detail = tab.text("#detail")
        for words in ("r2", "Explain in detail: What is the value of item 2?", "And there is more to it.", "accuracy:"):
            assert words in detail, words
        marked = tab.js("[...document.querySelectorAll('#detail ins')].map(e => e.textContent).join(' ')")
        assert "Explain in detail" in marked
        for column, count in (("task", 2), ("reject reason", 2)):
            assert tab.js(f"document.querySelectorAll('#facets [data-column=\"{column}\"] input').length") == count
        tab.click("#facets [data-column=task] input")
        tab.wait("document.querySelector('#count').textContent.startsWith('6 ')")
        assert tab.errors() == []
    finally:
        browser.close()
