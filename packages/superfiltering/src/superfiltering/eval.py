"""How good is a student: the loss on the answers of held-out records, and any lm-eval task.

python -m superfiltering.eval MODEL --data heldout.jsonl       # = superfiltering eval
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from instruct_data.records import Records
from model_hooks import RequestError


def answer_loss(
    model: Any, tokenizer: Any, records: Records, *, template: str = "alpaca", max_length: int = 1024
) -> dict[str, Any]:
    """`loss`: mean loss of the answers' tokens given their prompts, nats a token, with its standard error over records;
    `records` and `tokens` that it is over."""
    from instruct_data.scoring import score
    from instruct_data.templates import template as template_named
    from paper_tables import progress
    from superfiltering.scores import pairs_of

    pairs = list(pairs_of(records, template_named(template, tokenizer)))
    with progress("tokens scored") as bar:
        table = score(model, tokenizer, pairs, compat="aligned", max_length=max_length, progress=bar).table()
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


if __name__ == "__main__":
    import sys

    from superfiltering.cli import app

    app(["eval", *sys.argv[1:]], prog_name="python -m superfiltering.eval")
