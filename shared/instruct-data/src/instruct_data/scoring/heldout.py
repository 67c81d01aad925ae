"""How well a model says the answers of records that it has not learned from."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from instruct_data.records import Records
from instruct_data.templates import template as template_named
from model_hooks.errors import RequestError

from .engine import score
from .forward import Progress
from .pairs import Pair


def answer_loss(
    model: Any, tokenizer: Any, records: Records, *, template: str = "alpaca", max_length: int = 1024,
    progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """`loss`: mean loss of the answers' tokens given their prompts, nats a token, with its standard error over records;
    `records` and `tokens` that it is over. Raises `RequestError` where no answer has a token within `max_length`."""
    prompt: Callable[[Any], str] = template_named(template, tokenizer)
    pairs = [
        Pair(f"{record.id}\t{turn}", prompt(example), example.response)
        for record in records
        for turn, example in enumerate(record.examples)
    ]
    table = score(model, tokenizer, pairs, compat="aligned", max_length=max_length, progress=progress).table()
    total, count = (table[name].to_numpy().astype(np.float64) for name in ("loss_cond_sum", "n_cond"))
    used = np.isfinite(total) & (count > 0)
    total, count = total[used], count[used]
    if not used.any():
        raise RequestError(
            f"no record of {records.name} has an answer within {max_length} tokens; give a larger --max-length"
        )
    value = total.sum() / count.sum()
    spread = math.sqrt(((total - value * count) ** 2).sum()) / count.sum()  # of a ratio of sums over records
    return {"loss": {"value": value, "se": spread}, "records": int(used.sum()), "tokens": int(count.sum())}
