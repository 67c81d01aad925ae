"""Whether a prompt leaves room for an answer, of models in this process: a server says so itself."""

from __future__ import annotations

from typing import Any

from .request import Reply, Request


def prompt_ids(tokenizer: Any, request: Request) -> list[int]:
    """The tokens of a request's messages, by the tokenizer's chat template."""
    messages = [dict(message) for message in request.messages]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def too_long(tokens: int, context: int) -> Reply:
    """What a prompt gets that fills the context."""
    return Reply(None, error=f"prompt of {tokens} tokens, the model takes {context} with the answer")
