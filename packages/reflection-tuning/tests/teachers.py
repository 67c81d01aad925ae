"""Records, and what a server says that reflects on them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from llm_server import Answer, Call, answer

CRITICISM = dict.fromkeys(("helpfulness", "relevance", "accuracy", "detail"), "could be better")


def part(call: Call, name: str) -> str:
    """A text of a request."""
    found = re.search(rf"<{name}>\n(.*?)\n</{name}>", str(call.json["messages"][1]["content"]), re.DOTALL)
    return found[1] if found else ""


def on_instruction(call: Call) -> bool:
    return "new instruction" in str(call.json["messages"][0]["content"])


def reply(call: Call) -> str:
    """Asks for more, and says the answer again at some length."""
    old, said = part(call, "instruction"), part(call, "answer")
    if on_instruction(call):
        made = {"new_instruction": f"Explain in detail: {old}", "new_answer": f"In detail, {said} That is why."}
    else:
        made = {"better_answer": f"Well then: {said} And there is more to it."}
    return json.dumps({"criticism": CRITICISM, **made})


def teaching(call: Call) -> Answer:
    return answer(reply(call))


WORDS = ["the", "value", "of", "self", "is", "returned", "as", "a", "list", "if", "not", "in", "for", "every", "item"]


def some_records(count: int) -> list[dict[str, Any]]:
    """Different alpaca records, a third of them with an input."""
    return [
        {
            "id": f"r{n}", "instruction": f"What is the value of item {n}?",
            "input": f"item {n + 7}" if n % 3 == 0 else "",
            "output": " ".join(WORDS[(n * 7 + k * (1 + n % 4)) % len(WORDS)] for k in range(4 + n % 9)) + f" {n}.",
            "category": "ab"[n % 2],
        }
        for n in range(count)
    ]  # fmt: skip


def lines(path: str | Path, rows: list[Any]) -> str:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
