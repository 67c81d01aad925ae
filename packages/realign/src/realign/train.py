"""Fine-tune a student on realigned records by TRL: SFT, or DPO on the preference export.

    realign train --model zoo:llama --data realigned.jsonl --output student
    realign train --model student --data preference.jsonl --preferred --output preferring
    torchrun --nproc-per-node 8 -m realign.train --config configs/sft.yaml --model MODEL --data DATA --output OUT
    accelerate launch -m realign.train ...        deepspeed --module realign.train ...

A killed run goes on from its last checkpoint, in a folder beside the output (`student.training`), when the same
command is given again. The result is an ordinary checkpoint folder with a model card.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

from paper_tables.launch import run_module
from paper_tables.options import command_of
from paper_tables.training import PreferenceRun, fine_tune


@dataclass(frozen=True)
class TrainConfig(PreferenceRun):
    """What to fine-tune, on what, and how: `paper_tables.training.PreferenceRun`."""


def train(config: TrainConfig) -> dict[str, Any]:
    """Fine-tune as `config` says and write the student; call it in every process of a launcher.

    Returns output, records, steps, loss (the last logged), seconds. Raises `RequestError` for a request that cannot be
    met, `WorkFailed` where the loss is no number any more; neither writes the output.
    """
    from instruct_data.completions import training_rows

    return fine_tune(
        config, partial(training_rows, config), module_file=__file__, package="realign",
        paper="arXiv 2402.12219",
    )  # fmt: skip


train_command = command_of(
    TrainConfig, train, "Fine-tune a model on realigned records, or on preferences (--preferred)."
)


def main(argv: list[str] | None = None) -> None:
    """`python -m realign.train`, for launchers; the same as the verb `train` of `realign`."""
    run_module("realign.train", train_command, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    main()
