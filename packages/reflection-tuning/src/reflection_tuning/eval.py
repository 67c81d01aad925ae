"""How good is a student: the loss on held-out answers, and lm-eval tasks such as those of the Open LLM Leaderboard.

python -m reflection_tuning.eval MODEL --data heldout.jsonl       # = reflection-tuning eval
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from instruct_data.records import Records


def evaluate(
    model: str, records: Records, *, template: str = "vicuna", max_length: int = 2048, tasks: Sequence[str] = (),
    task_limit: int = 0, dtype: str = "auto", device_map: str = "",
) -> dict[str, Any]:  # fmt: skip
    """`loss`, nats a token of the answers, with its standard error; `records`, `tokens`; and a figure for each task."""
    from instruct_data.scoring.heldout import answer_loss
    from model_hooks.loading import load_placed
    from paper_tables import progress
    from paper_tables.quality import accuracies

    loaded, tokenizer = load_placed(model, dtype, device_map)
    with progress("tokens scored") as bar:
        found = answer_loss(loaded, tokenizer, records, template=template, max_length=max_length, progress=bar)
    return found | (accuracies(loaded, tokenizer, tasks, limit=task_limit or None) if tasks else {})


if __name__ == "__main__":
    import sys

    from reflection_tuning.cli import app

    app(["eval", *sys.argv[1:]], prog_name="python -m reflection_tuning.eval")
