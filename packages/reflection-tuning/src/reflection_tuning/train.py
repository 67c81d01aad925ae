"""Fine-tune a student on selected records by TRL: SFT, or DPO on the preference export.

    reflection-tuning train --model zoo:llama --data selected.jsonl --output student
    reflection-tuning train --model student --data preferences.jsonl --preferred --output preferring
    torchrun --nproc-per-node 8 -m reflection_tuning.train --config configs/sft.yaml --model MODEL ...
    accelerate launch -m reflection_tuning.train ...        deepspeed --module reflection_tuning.train ...

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
    """What to fine-tune, on what, and how: `paper_tables.training.PreferenceRun`.

    Args:
        template: How a record becomes a prompt: none, alpaca, vicuna (the paper's), wiz or chat.
    """

    template: str = "vicuna"


def train(config: TrainConfig) -> dict[str, Any]:
    """Fine-tune as `config` says and write the student; call it in every process of a launcher.

    Returns output, records, steps, loss (the last logged), seconds. Raises `RequestError` for a request that cannot be
    met, `WorkFailed` where the loss is no number any more; neither writes the output.
    """
    from instruct_data.completions import training_rows

    return fine_tune(
        config, partial(training_rows, config), module_file=__file__, package="reflection-tuning",
        paper="arXiv 2402.10110",
    )  # fmt: skip


train_command = command_of(
    TrainConfig, train, "Fine-tune a model on selected records, or on preferences (--preferred)."
)


def main(argv: list[str] | None = None) -> None:
    """`python -m reflection_tuning.train`, for launchers; the same as the verb `train` of `reflection-tuning`."""
    run_module("reflection_tuning.train", train_command, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    main()
