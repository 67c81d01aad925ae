"""Replies of a form that was asked for, read from whatever the model wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .request import Reply, Request

_KINDS: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "object": (dict,),
    "array": (list,),
}


class ParseError(ValueError):
    """A reply that is not of the form; the message can be shown to the model."""


@dataclass(frozen=True)
class Form:
    """What a reply must hold.

    schema: a JSON schema of an object; type, required, properties, items and enum are checked. labels: for models that
    write no JSON, (label, property) in the order in which they stand in the text; a label begins a line, in any case.
    """

    schema: Mapping[str, Any]
    labels: Sequence[tuple[str, str]] = ()

    def parse(self, text: str) -> dict[str, Any]:
        """The object in `text`: all of it as JSON, else the first balanced object in it, else by the labels, also
        where that object is not of the schema: it may be code in an answer.

        Raises `ParseError`.
        """
        value = _json(text)
        if value is None or not self._fits(value):
            value = (by_labels(text, self.labels) if self.labels else None) or value
        if value is None:
            wanted = "a JSON object" + (
                f" or the labels {', '.join(label for label, _ in self.labels)}" if self.labels else ""
            )
            raise ParseError(f"the reply does not hold {wanted}")
        check(value, self.schema)
        return value

    def _fits(self, value: Any) -> bool:
        try:
            check(value, self.schema)
        except ParseError:
            return False
        return True


def _json(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = first_object(text)
    return value if isinstance(value, dict) else None


def first_object(text: str) -> dict[str, Any] | None:
    """The first JSON object in `text`, whatever stands around it."""
    decoder = json.JSONDecoder(strict=False)  # models write line breaks inside strings
    start = text.find("{")
    while start >= 0:
        try:
            value, _ = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            start = text.find("{", start + 1)
            continue
        return value if isinstance(value, dict) else None
    return None


def by_labels(text: str, labels: Sequence[tuple[str, str]]) -> dict[str, str] | None:
    """The texts after the labels, each up to the next one; None unless all are there, in their order."""
    found, end = {}, len(text)
    for label, name in reversed(labels):
        pattern = re.compile(rf"^[ \t>*#]*{re.escape(label)}[ \t]*:?[*]*[ \t]*:?", re.IGNORECASE | re.MULTILINE)
        places = list(pattern.finditer(text, 0, end))
        if not places:
            return None
        place = places[0]
        found[name], end = text[place.end() : end].strip(), place.start()
    return {name: found[name] for _, name in labels}


def check(value: Any, schema: Mapping[str, Any], path: str = "") -> None:
    """Raise `ParseError` where `value` is not of `schema`."""
    where = path or "the reply"
    kind = schema.get("type")
    if kind is not None:
        wrong_bool = isinstance(value, bool) and kind != "boolean"
        if wrong_bool or not isinstance(value, _KINDS[kind]):
            raise ParseError(f"{where} is of type {type(value).__name__}, must be {kind}")
    if "enum" in schema and value not in schema["enum"]:
        raise ParseError(f"{where} is {str(value)[:80]!r}, which is none of the accepted values")
    if isinstance(value, dict):
        for name in schema.get("required", ()):
            if name not in value:
                raise ParseError(f"{where} lacks {name!r}")
        for name, part in schema.get("properties", {}).items():
            if name in value:
                check(value[name], part, f"{path}.{name}" if path else name)
    if isinstance(value, list) and "items" in schema:
        for at, item in enumerate(value):
            check(item, schema["items"], f"{path}[{at}]")


@dataclass(frozen=True)
class Parsed:
    """A reply and the object in it. `value` is None where there is none, and `problem` says why: failed, truncated
    (cut at its longest) or parse_failed. `replies` are all that were paid for, the last one the last."""

    value: dict[str, Any] | None
    problem: str
    replies: tuple[Reply, ...]
    requests: tuple[Request, ...]


async def ask_parsed(
    ask: Callable[[Request], Awaitable[Reply]], request: Request, parse: Callable[[str], dict[str, Any]],
    warmer: float = 0.0,
) -> Parsed:  # fmt: skip
    """Ask; where the reply cannot be parsed ask once more, showing the model its reply and what is wrong with it.

    warmer: what the second time's temperature is higher by.
    """
    replies: list[Reply] = []
    requests: list[Request] = []
    for _ in range(2):
        reply = await ask(request)
        replies.append(reply)
        requests.append(request)
        if reply.text is None or reply.truncated:
            return Parsed(None, "truncated" if reply.truncated else "failed", tuple(replies), tuple(requests))
        try:
            return Parsed(parse(reply.text), "", tuple(replies), tuple(requests))
        except ParseError as error:
            again = (
                {"role": "assistant", "content": reply.text},
                {"role": "user", "content": f"This cannot be used: {error}. Answer again, in the form asked for only."},
            )
            request = replace(request, messages=(*request.messages, *again))
            if warmer:
                drawn = {"temperature": float(request.sampling.get("temperature") or 0.0) + warmer}
                request = replace(request, sampling={**request.sampling, **drawn})
    return Parsed(None, "parse_failed", tuple(replies), tuple(requests))
