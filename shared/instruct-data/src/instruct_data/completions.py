"""Records as trainers want them: prompts with the answers that follow, or with a chosen and a rejected answer."""

from __future__ import annotations

from typing import Any

from model_hooks.errors import RequestError

from .formats import open_source
from .records import read
from .schemas import Example, question_of
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


def preferences(data: str, template_name: str, tokenizer: Any) -> list[dict[str, str]]:
    """`prompt`, `chosen` and `rejected` as texts, of records as `preference` makes them.

    Raises `RequestError` for a record that is no preference.
    """
    prompt, rows = template(template_name, tokenizer), []
    for row in open_source(data, None, None, None, "strict").rows():
        record = row.data if isinstance(row.data, dict) else {}
        if row.fault is not None or not {"prompt", "chosen", "rejected"} <= set(record):
            raise RequestError(
                f"{row.where}: {row.fault or 'needs prompt, chosen and rejected; see export --form preference'}"
            )
        (whole,) = read([{"messages": [*record["prompt"], *record["chosen"]]}], "messages", name=data)
        rejected = record["rejected"][-1]["content"]
        example = whole.examples[-1]
        rows.append({"prompt": prompt(example), "chosen": example.response, "rejected": rejected})
    if not rows:
        raise RequestError(f"{data} has no preference to learn from")
    return rows


def training_rows(config: Any, tokenizer: Any) -> list[dict[str, str]]:
    """What a run learns from: `completions` of its `data`, `schema` and `template`, or where it is `preferred`,
    `preferences`."""
    if config.preferred:
        return preferences(config.data, config.template, tokenizer)
    return completions(config.data, config.schema, config.template, tokenizer)


def prompt_messages(example: Example) -> list[dict[str, str]]:
    """What the answer follows, as messages: the system text, the earlier turns, the question."""
    found = [{"role": "system", "content": example.system}] if example.system else []
    for user, assistant in example.history:
        found += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return [*found, {"role": "user", "content": question_of(example)}]


def preference(id: str, prompt: list[dict[str, str]], chosen: str, rejected: str) -> dict[str, Any]:
    """A record as TRL's DPOTrainer reads them."""
    answers = {"chosen": chosen, "rejected": rejected}
    return {"id": id, "prompt": prompt} | {k: [{"role": "assistant", "content": v}] for k, v in answers.items()}
