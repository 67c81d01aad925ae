"""What a server that rewrites says."""

from __future__ import annotations

import json

from llm_server import Answer, Call, answer


def response_of(call: Call) -> str:
    """The original answer in a request to rewrite."""
    return (
        str(call.json["messages"][1]["content"]).partition("[response starts]\n")[2].partition("\n[response ends]")[0]
    )


def revised(text: str, suitable: bool = True) -> str:
    return json.dumps({"suitable": suitable, "reasoning": "because", "revised_response": text})


def rewriting(call: Call) -> Answer:
    """Says the answer again, with an introduction; and to the probe what it wants."""
    return answer(revised(f"In short:\n- {response_of(call)}\nThat is all."))
