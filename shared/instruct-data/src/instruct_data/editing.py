"""Records with another answer, or another instruction, in whatever shape they have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model_hooks.errors import RequestError

from .schemas import SCHEMAS

_TURNS = {
    "sharegpt": ("conversations", "from", "value"),
    "messages": ("messages", "role", "content"),
    "items": ("items", "from", "value"),
}
_ASSISTANT = ("gpt", "chatgpt", "assistant")


def edited(
    schema: str, data: Mapping[str, Any], *, response: str | None = None, instruction: str | None = None, at: int = -1
) -> dict[str, Any]:
    """`data`, a good record of `schema`, with the response of its example number `at` replaced, and the instruction.

    A new instruction takes the place of instruction and input together: the input becomes empty where there is one.
    What is None stays. `data` itself is not changed, and keys, their order and all other values stay.
    """
    if schema not in SCHEMAS:
        raise RequestError(f"schema {schema!r} is none of {', '.join(SCHEMAS)}")
    made = dict(data)
    if schema == "alpaca":
        _put(made, "instruction", "output", instruction, response)
    elif schema == "instances":
        if instruction is not None:
            made["instruction"] = instruction
        made["instances"] = instances = [dict(instance) for instance in data["instances"]]
        _put(instances[at], "", "output", instruction, response)
    else:
        key, role, text = _TURNS[schema]
        made[key] = turns = [dict(turn) for turn in data[key]]
        answers = [place for place, turn in enumerate(turns) if turn[role] in _ASSISTANT]
        for place, value in ((answers[at], response), (answers[at] - 1, instruction)):
            if value is not None:
                turns[place][text] = value
    return made


def _put(data: dict[str, Any], question: str, answer: str, instruction: str | None, response: str | None) -> None:
    if instruction is not None:
        if question:
            data[question] = instruction
        if data.get("input"):
            data["input"] = ""
    if response is not None:
        data[answer] = response
