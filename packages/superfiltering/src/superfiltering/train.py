"""Fine-tune a model on instruction records, those selected say, by TRL's SFTTrainer; the loss is on the answers alone.

    superfiltering train --model zoo:llama --data selected.jsonl --output student
    torchrun --nproc-per-node 8 -m superfiltering.train --config configs/sft.yaml --model MODEL --data DATA --output OUT
    accelerate launch -m superfiltering.train ...        deepspeed --module superfiltering.train ...

A killed run goes on from its last checkpoint, in a folder beside the output (`student.training`), when the same
command is given again. The result is an ordinary checkpoint folder with a model card.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from paper_tables.launch import run_module
from paper_tables.options import command_of
from paper_tables.training import SftRun, fine_tune


@dataclass(frozen=True)
class TrainConfig(SftRun):
    """What to fine-tune, on what, and how: `paper_tables.training.SftRun`."""


def train(config: TrainConfig) -> dict[str, Any]:
    """Fine-tune as `config` says and write the student; call it in every process of a launcher.

    Returns output, records, steps, loss (the last logged, nats a token of the answers), seconds. Raises `RequestError`
    for a request that cannot be met, `WorkFailed` where the loss is no number any more; neither writes the output.
    """
    from instruct_data.completions import completions

    return fine_tune(
        config, lambda tokenizer: completions(config.data, config.schema, config.template, tokenizer),
        module_file=__file__, package="superfiltering", paper="arXiv 2402.00530",
    )  # fmt: skip


train_command = command_of(TrainConfig, train, "Fine-tune a model on instruction records; the loss is on the answers.")


def main(argv: list[str] | None = None) -> None:
    """`python -m superfiltering.train`, for launchers; the same as the verb `train` of `superfiltering`."""
    run_module("superfiltering.train", train_command, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    main()
