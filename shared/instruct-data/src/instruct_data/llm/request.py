"""What is asked and what comes back, the same for every back end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from instruct_data.journal import content_key

Message = Mapping[str, str]


@dataclass(frozen=True)
class Request:
    """One completion that is wanted of a chat model.

    stage: what it is for ("rewrite"); tokens are accounted by it. sampling: fields of the request's body, such as
    temperature, top_p and max_tokens. schema: the JSON schema of the reply, None for free text. candidate: which of
    several replies to the same messages this is; they are separate requests, since `n` is not portable.
    """

    stage: str
    model: str
    messages: tuple[Message, ...]
    sampling: Mapping[str, Any] = field(default_factory=dict)
    schema: Mapping[str, Any] | None = None
    prompt_version: str = ""
    candidate: int = 0

    @cached_property
    def key(self) -> str:
        """The content hash under which the reply is kept; where the record stands is no part of it."""
        return content_key({**vars(self), "messages": [dict(message) for message in self.messages]})

    @property
    def seed(self) -> int:
        """What this request is sampled by: of its content, so that a run that goes on gives the same answers."""
        return int(self.key[:15], 16) ^ int(self.sampling.get("seed") or 0)

    def candidates(self, count: int) -> list[Request]:
        """This request and `count - 1` more like it."""
        return [replace(self, candidate=number) for number in range(count)]

    def body(self) -> dict[str, Any]:
        """The body of POST /chat/completions."""
        made: dict[str, Any] = {"model": self.model, "messages": [dict(m) for m in self.messages], **self.sampling}
        if self.schema is not None:
            made["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": self.stage, "strict": True, "schema": dict(self.schema)},
            }
        return made


@dataclass(frozen=True)
class Usage:
    """Tokens as the server counted them; `cached` are those of `prompt` that it had already."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0

    @property
    def total(self) -> int:
        return self.prompt + self.completion

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.prompt + other.prompt, self.completion + other.completion, self.cached + other.cached)


@dataclass(frozen=True)
class Reply:
    """What came back. `text` is None where the request failed for good, and `error` says why.

    attempts: requests sent until this came. seconds: of the last attempt. journalled: it was not asked for again.
    """

    text: str | None
    finish_reason: str = ""
    usage: Usage = Usage()
    model: str = ""
    attempts: int = 1
    seconds: float = 0.0
    error: str = ""
    journalled: bool = False

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"

    def stored(self) -> dict[str, Any]:
        """As the journal holds it."""
        value = {**vars(self), "usage": dict(vars(self.usage))}
        del value["journalled"], value["error"]
        return value

    @staticmethod
    def restored(value: Mapping[str, Any]) -> Reply:
        return Reply(**{**value, "usage": Usage(**value["usage"]), "journalled": True})


def reply_of(body: Any) -> Reply:
    """The reply in a body of the chat completions API. Raises `ValueError` where it holds none."""
    try:
        text, finish = said_in(body["choices"][0])
    except (TypeError, KeyError, IndexError, AttributeError):
        raise ValueError("the body is no chat completion") from None
    if not isinstance(text, str):
        raise ValueError("the reply has no text")
    return Reply(text, finish, usage_of(body), str(body.get("model") or ""))


def said_in(choice: Any) -> tuple[Any, str]:
    """What a choice says, and why it ended. A refusal is a text too, and a message without one, as of a model whose
    tokens went into its reasoning, says "": it was paid for."""
    message = choice["message"]
    return message.get("content") or message.get("refusal") or "", choice.get("finish_reason") or ""


def usage_of(body: Any) -> Usage:
    """The tokens that a body says were used; none where it says nothing."""
    found = body.get("usage") if isinstance(body, Mapping) else None
    if not isinstance(found, Mapping):
        return Usage()
    details = found.get("prompt_tokens_details") or {}
    return Usage(
        found.get("prompt_tokens") or 0, found.get("completion_tokens") or 0, details.get("cached_tokens") or 0
    )
