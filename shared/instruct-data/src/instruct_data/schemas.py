"""The shapes of instruction records, and one common view of them: an `Example` per assistant turn.

| schema    | a record                                                                      |
|-----------|-------------------------------------------------------------------------------|
| alpaca    | `instruction`, `output`, and an `input` that may be absent or null            |
| sharegpt  | `conversations`: turns of `from` (human, gpt, system) and `value`             |
| messages  | `messages`: turns of `role` (user, assistant, system) and `content`           |
| items     | `items`: turns of `from` and `value`, as ReAlign writes them                  |
| instances | `instruction` and `instances` of `input` and `output`, as in Self-Instruct    |

Other keys are nobody's business here: they stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model_hooks.errors import RequestError

from .errors import RecordFault

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",
}


@dataclass(frozen=True, slots=True)
class Example:
    """One answer and what it answers.

    `instruction` is the user's text, `input` the alpaca input ("" where there is none), `response` the assistant's
    text, `history` the earlier (user, assistant) turns of the same conversation, `system` its system text or None.
    """

    instruction: str
    input: str
    response: str
    history: tuple[tuple[str, str], ...] = ()
    system: str | None = None


def question_of(example: Example) -> str:
    """Instruction and input as one text."""
    return example.instruction + (f"\n{example.input}" if example.input else "")


@dataclass(frozen=True)
class Schema:
    """A record shape. `examples(data)` gives the common view, or raises `RecordFault` with the key that is wrong."""

    name: str
    keys: tuple[str, ...]
    examples: Callable[[Mapping[str, Any]], tuple[Example, ...]]


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), f"of type {type(value).__name__}")


def _value(data: Mapping[str, Any], key: str, kind: type, path: str = "") -> Any:
    path = path + key
    if key not in data:
        there = ", ".join(map(repr, list(data)[:8])) or "nothing"
        raise RecordFault(path, f"is missing; beside it there is {there}")
    value = data[key]
    if not isinstance(value, kind):
        raise RecordFault(path, f"is {_kind(value)}, must be {_kind(kind())}")
    return value


def _optional_text(data: Mapping[str, Any], key: str, path: str = "") -> str:
    return "" if data.get(key) is None else str(_value(data, key, str, path))


def _alpaca(data: Mapping[str, Any]) -> tuple[Example, ...]:
    instruction = _value(data, "instruction", str)
    return (Example(instruction, _optional_text(data, "input"), _value(data, "output", str)),)


def _instances(data: Mapping[str, Any]) -> tuple[Example, ...]:
    instruction = _value(data, "instruction", str)
    examples = []
    for path, instance in _objects(data, "instances"):
        text = _optional_text(instance, "input", path)
        examples.append(Example(instruction, text, _value(instance, "output", str, path)))
    return tuple(examples)


def _objects(data: Mapping[str, Any], key: str) -> list[tuple[str, Mapping[str, Any]]]:
    """The objects of the list at `key`, each with its path; an empty list is a fault."""
    values = _value(data, key, list)
    if not values:
        raise RecordFault(key, "is empty, must hold at least one answer")
    for at, value in enumerate(values):
        if not isinstance(value, Mapping):
            raise RecordFault(f"{key}[{at}]", f"is {_kind(value)}, must be an object")
    return [(f"{key}[{at}].", value) for at, value in enumerate(values)]


def _conversation(key: str, role_key: str, text_key: str) -> Callable[[Mapping[str, Any]], tuple[Example, ...]]:
    """The view of a conversation: at most one system turn, at the beginning; then user and assistant by turns."""

    def examples(data: Mapping[str, Any]) -> tuple[Example, ...]:
        found: list[Example] = []
        history: list[tuple[str, str]] = []
        system = user = None
        for at, (path, turn) in enumerate(_objects(data, key)):
            name = _value(turn, role_key, str, path)
            role = _ROLES.get(name)
            if role is None:
                raise RecordFault(path + role_key, f"is {name!r}, must be one of {', '.join(_ROLES)}")
            text = _value(turn, text_key, str, path)
            if role == "system" and at == 0:
                system = text
            elif role == "user" and user is None:
                user = text
            elif role == "assistant" and user is not None:
                found.append(Example(user, "", text, tuple(history), system))
                history.append((user, text))
                user = None
            else:
                raise RecordFault(
                    path + role_key, f"is {name!r} out of turn; the order is system, then user, assistant"
                )
        if not found:
            raise RecordFault(key, "has no answer: no assistant's turn in it")
        return tuple(found)

    return examples


SCHEMAS = {
    schema.name: schema
    for schema in (
        Schema("alpaca", ("instruction", "output"), _alpaca),
        Schema("sharegpt", ("conversations",), _conversation("conversations", "from", "value")),
        Schema("messages", ("messages",), _conversation("messages", "role", "content")),
        Schema("items", ("items",), _conversation("items", "from", "value")),
        Schema("instances", ("instruction", "instances"), _instances),
    )
}


def _votes(first: Sequence[Mapping[str, Any]], enough: Callable[[Sequence[bool]], bool]) -> list[Schema]:
    """The schemas whose keys `enough` says are there in the most of the records, if in any."""
    counts = {
        name: sum(enough([key in data for key in schema.keys]) for data in first) for name, schema in SCHEMAS.items()
    }
    most = max(counts.values())
    return [SCHEMAS[name] for name, count in counts.items() if count == most > 0]


def choose(wanted: str, first: Sequence[Mapping[str, Any]], name: str) -> Schema:
    """The schema `wanted`, or for "auto" the one that the most of the `first` records have the keys of.

    Raises `RequestError` for an unknown name, for records that fit none or several, and for a `wanted` schema that none
    of them has a key of.
    """
    if wanted != "auto" and wanted not in SCHEMAS:
        raise RequestError(f"schema {wanted!r} is none of auto, {', '.join(SCHEMAS)}")
    full = _votes(first, all)
    keys = ", ".join(map(str, first[0])) if first else ""
    if wanted != "auto":
        chosen = SCHEMAS[wanted]
        if first and not any(key in data for data in first for key in chosen.keys):
            hint = f" and look like {full[0].name}" if full else ""
            needed = " and ".join(chosen.keys)
            raise RequestError(
                f"{name} is not of schema {wanted}: its records lack {needed}; they have {keys or 'no keys'}{hint}"
            )
        return chosen
    fitting = full or _votes(first, any)
    if not fitting:
        shapes = "; ".join(f"{schema.name} ({' and '.join(schema.keys)})" for schema in SCHEMAS.values())
        raise RequestError(f"the records of {name} have {keys or 'no keys'}, which fits no schema; known are {shapes}")
    if len(full) > 1:
        names = ", ".join(schema.name for schema in full)
        raise RequestError(f"the records of {name} fit more than one schema ({names}); name one with --schema")
    return fitting[0]
