"""What routers learn from: prompts, on which they decide, and what follows, on which the loss is.

A source is text (zoo:train, a .txt file, any source of `model_hooks.text`), of which each window's first part is the
prompt; or instruction records (`instruct_data`: alpaca, messages, sharegpt; also lines with `prompt` and `completion`).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model_hooks.errors import RequestError

KINDS = ("auto", "text", "records")
COMPLETION = ("prompt", "completion")


@dataclass(frozen=True)
class Example:
    """Token ids [T], of which the first `prompt` are the prompt (at least one is, at least one is not)."""

    ids: Tensor
    prompt: int


def read_examples(
    source: str, tokenizer: Any, *, samples: int, length: int, kind: str = "auto", template: str = "none", seed: int = 0
) -> list[Example]:
    """At most `samples` examples of at most `length` tokens.

    Args:
        kind: text, records, or auto: records where the name ends in .json, .jsonl, .parquet or begins with zoo:pairs.
        template: of the prompts of records: none, alpaca, vicuna or chat.
        seed: of the places where text is cut into prompt and rest.

    Raises:
        RequestError: nothing in it can be trained on, or a record is faulty (named by file and row).
    """
    if kind not in KINDS:
        raise RequestError(f"kind {kind!r} is not accepted; give one of {', '.join(KINDS)}")
    if length < 2 or samples < 1:
        raise RequestError(f"samples {samples} and length {length}: at least 1 example of 2 tokens is needed")
    if kind == "records" or (kind == "auto" and _looks_like_records(source)):
        return _from_records(source, tokenizer, samples, length, template)
    from model_hooks.text import load_sequences

    lot = random.Random(seed)
    sequences = load_sequences(tokenizer, source, samples=samples, length=length)
    return [Example(row, lot.randint(max(1, length // 8), max(1, length // 2))) for row in sequences]


def _looks_like_records(source: str) -> bool:
    name = Path(source).name.removesuffix(".gz").removesuffix(".zst")
    return source.startswith("zoo:pairs") or name.endswith((".json", ".jsonl", ".ndjson", ".parquet"))


def _from_records(source: str, tokenizer: Any, samples: int, length: int, template: str) -> list[Example]:
    from instruct_data.templates import template as find

    prompt_of = find(template, tokenizer)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    found: list[Example] = []
    seen = 0
    for record in _records(source):
        for turn in record.examples[-1:]:
            seen += 1
            prompt = tokenizer(prompt_of(turn))["input_ids"]
            answer = tokenizer(turn.response, add_special_tokens=False)["input_ids"]
            ids = (prompt + answer + end)[:length]
            if answer and 0 < len(prompt) < len(ids):
                found.append(Example(torch.tensor(ids), len(prompt)))
        if len(found) == samples:
            break
    if not found:
        raise RequestError(
            f"{source}: none of {seen} records has an answer within {length} tokens, so none can be learnt from; "
            "give a larger --length or other data"
        )
    return found


def _records(source: str) -> Iterator[Any]:
    """Records as instruct_data reads them; lines of `prompt` and `completion` are read as instruction and output."""
    from instruct_data.formats import open_source
    from instruct_data.records import Records

    opened = open_source(source, None, None, None, "strict")
    first = next(iter(opened.rows()), None)
    data = getattr(first, "data", None)
    if isinstance(data, dict) and any(key in data for key in COMPLETION):
        rows = opened.rows

        def renamed() -> Iterator[Any]:
            for row in rows():
                yield replace(row, data=_renamed(row.data, row.where))

        opened = replace(opened, rows=renamed)
    return iter(Records(opened, "auto", "fail", None, True))


def _renamed(data: Any, where: Any) -> Any:
    if not isinstance(data, dict) or not all(isinstance(data.get(key), str) for key in COMPLETION):
        there = ", ".join(map(repr, data)) if isinstance(data, dict) else type(data).__name__
        raise RequestError(f"{where}: a record needs text in 'prompt' and 'completion'; this one has {there}")
    return {"instruction": data["prompt"], "output": data["completion"]}


def collate(rows: Sequence[Example], pad: int = 0) -> dict[str, Tensor]:
    """A batch padded on the right: input_ids, attention_mask, labels (-100: prompts and padding), pool_mask [B, T]."""
    longest = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), longest), pad)
    real, prompt = torch.zeros(len(rows), longest, dtype=torch.bool), torch.zeros(len(rows), longest, dtype=torch.bool)
    for place, row in enumerate(rows):
        ids[place, : len(row.ids)] = row.ids
        real[place, : len(row.ids)] = True
        prompt[place, : row.prompt] = True
    labels = ids.masked_fill(prompt | ~real, -100)
    return {"input_ids": ids, "attention_mask": real.long(), "labels": labels, "pool_mask": prompt}


def to_tensors(rows: Sequence[Example]) -> dict[str, Tensor]:
    """As safetensors hold them."""
    return {
        "ids": torch.cat([row.ids for row in rows]),
        "lengths": torch.tensor([len(row.ids) for row in rows]),
        "prompts": torch.tensor([row.prompt for row in rows]),
    }


def from_tensors(tensors: dict[str, Tensor]) -> list[Example]:
    parts = tensors["ids"].split(tensors["lengths"].tolist())
    return [Example(ids.clone(), prompt) for ids, prompt in zip(parts, tensors["prompts"].tolist())]
