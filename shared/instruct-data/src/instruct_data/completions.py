"""Records as trainers want them: prompts with the answers that follow."""

from __future__ import annotations

from typing import Any

from model_hooks.errors import RequestError

from .records import read
from .templates import template


def completions(data: Any, schema: str, template_name: str, tokenizer: Any) -> list[dict[str, str]]:
    """A row for every assistant turn: `prompt` with its history, `completion` the answer; not those without one.

    Raises `RequestError` where no record has an answer.
    """
    prompt = template(template_name, tokenizer)
    rows = [
        {"prompt": prompt(example), "completion": example.response}
        for record in read(data, schema)
        for example in record.examples
        if example.response
    ]
    if not rows:
        raise RequestError(f"no record of {data} has an answer: there is nothing to learn")
    return rows
