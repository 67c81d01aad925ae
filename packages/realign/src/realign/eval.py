"""How good is a student at problems with a number for an answer (the paper's GSM8K and MATH figures).

python -m realign.eval MODEL --data problems.jsonl       # = realign eval
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from instruct_data.records import Records
from model_hooks import RequestError

from .filters import result_of


def exact_match(
    model: Any, tokenizer: Any, records: Records, *, template: str = "alpaca", max_new_tokens: int = 256,
    batch_size: int = 16,
) -> dict[str, Any]:  # fmt: skip
    """`exact_match`: percent of the answers, greedy, that end in the reference's result, with its binomial standard
    error; and `problems`, how many there are. Raises `RequestError` for a reference without a number."""
    from instruct_data.templates import template as template_named
    from paper_tables import progress

    prompt = template_named(template, tokenizer)
    wanted, prompts = [], []
    for record in records:
        result = result_of(record.examples[-1].response)
        if result is None:
            raise RequestError(f"{record.where}: the answer of record {record.id} has no number to compare with")
        wanted.append(result)
        prompts.append(prompt(record.examples[-1]))
    with progress("problems", len(prompts)) as bar:
        answers = generate(model, tokenizer, prompts, max_new_tokens, batch_size, bar)
        right = [result_of(answer) == result for answer, result in zip(answers, wanted)]
    share = sum(right) / len(right)
    error = math.sqrt(share * (1 - share) / len(right))
    return {"exact_match": {"value": 100 * share, "se": 100 * error}, "problems": len(right)}


def generate(
    model: Any, tokenizer: Any, prompts: Iterable[str], max_new_tokens: int, batch_size: int, bar: Any = None
) -> Iterator[str]:
    """Greedy answers, in the prompts' order, in batches padded on the left."""
    import torch

    waiting = list(prompts)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    for start in range(0, len(waiting), batch_size):
        rows = [tokenizer(text)["input_ids"] for text in waiting[start : start + batch_size]]
        longest = max(map(len, rows))
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=model.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=model.device)
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad
            )
        for row in out[:, longest:]:  # [batch, new]
            yield tokenizer.decode(row, skip_special_tokens=True)
        if bar is not None:
            bar.advance(len(rows))


if __name__ == "__main__":
    import sys

    from realign.cli import app

    app(["eval", *sys.argv[1:]], prog_name="python -m realign.eval")
