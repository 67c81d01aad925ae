"""Fine-tune a model on instruction records, those selected say, by TRL's SFTTrainer; the loss is on the answers alone.

    superfiltering train --model zoo:llama --data selected.jsonl --output student
    torchrun --nproc-per-node 8 -m superfiltering.train --config configs/sft.yaml --model MODEL --data DATA --output OUT
    accelerate launch -m superfiltering.train ...        deepspeed --module superfiltering.train ...

A killed run goes on from its last checkpoint, in a folder beside the output (`student.training`), when the same
command is given again. The result is an ordinary checkpoint folder with a model card.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from typing import Any

from model_hooks import RequestError
from paper_tables.launch import deepspeed_file, is_main_process, run_module
from paper_tables.options import command_of
from paper_tables.training import LOG, RECORD, Run


@dataclass(frozen=True)
class TrainConfig(Run):
    """What to fine-tune, on what, and how.

    Args:
        model: Hub id, checkpoint folder or zoo:NAME.
        data: Records: a file, a folder of datasets, a hub name or zoo:pairs.
        output: Folder for the student: an ordinary checkpoint with a model card.
        template: How a record becomes a prompt: none, alpaca, vicuna or chat.
        schema: Of the records; auto tells it from the first.
        max_length: Tokens of prompt and answer; what is longer is cut.
        deepspeed: zero2, zero3, zero3-offload or a file; needs a launcher (torchrun, deepspeed).
        seed: Of the order of the records.

    Raises:
        RequestError: a value is not accepted.
    """

    data: str = ""
    template: str = "alpaca"
    schema: str = "auto"
    max_length: int = 2048
    epochs: float = 3.0
    learning_rate: float = 2e-5
    accumulation: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data:
            raise RequestError("data must be given: the records to learn from")
        self.at_least(2, "max_length")
        if not self.learning_rate:
            raise RequestError("learning_rate is 0; a number above 0 is needed")


def train(config: TrainConfig) -> dict[str, Any]:
    """Fine-tune as `config` says and write the student; call it in every process of a launcher.

    Returns output, records, steps, loss (the last logged, nats a token of the answers), seconds. Raises `RequestError`
    for a request that cannot be met, `WorkFailed` where the loss is no number any more; neither writes the output.
    """
    from model_hooks.files import refuse_existing, refuse_overlap
    from paper_tables.frame import require

    for module in ("trl", "deepspeed") if config.deepspeed else ("trl",):
        require(module, extra="train", package="superfiltering")
    refuse_existing(config.output, config.overwrite)
    refuse_overlap(config.output, config.model)
    deepspeed = deepspeed_file(__file__, config.deepspeed)
    config.goes_on()  # refuses another run before anything is loaded
    from accelerate import PartialState

    from superfiltering.sft import fit

    result = fit(config, deepspeed)
    if is_main_process():
        _finish(config, result)
    PartialState().wait_for_everyone()
    return result


def begin(config: TrainConfig, content: str) -> None:
    """Write down what the run is, `content` a hash of its data; nothing of a request that failed before is left.

    Raises `RequestError` where a run that is to go on was on other data.
    """
    from model_hooks.files import atomic_write

    record = config.record()
    if config.resume and record:
        if record.get("content") != content:
            raise RequestError(
                f"{config.work} holds a run on other records than {config.data} has now; --no-resume begins again"
            )
    elif is_main_process():
        shutil.rmtree(config.work, ignore_errors=True)
        record = {"settings": config.settings(), "content": content}
        atomic_write(config.work / RECORD, json.dumps(record, indent=1) + "\n")


def _finish(config: TrainConfig, result: dict[str, Any]) -> None:
    """Write the output from the trained weights; one process, whole tensors."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from model_hooks import Card, load, save
    from model_hooks.files import atomic_write

    unset_hf_deepspeed_config()  # else ZeRO-3 would cut what is loaded now
    model, _ = load(config.work / "trained", tokenizer=False, dtype="bfloat16" if config.bf16 else "float32")
    _, tokenizer = load(config.model, dtype="auto")
    measured = {"records": result["records"], "steps": result["steps"], "last training loss": result["loss"]}
    card = Card(config.model, f"superfiltering: fine-tuned on {config.data}", "arXiv 2402.00530", measured,
                config.settings())  # fmt: skip
    save(model, config.output, tokenizer, card=card, overwrite=config.overwrite, source=config.model)
    atomic_write(config.output / LOG, (config.work / LOG).read_text())
    shutil.rmtree(config.work)


train_command = command_of(TrainConfig, train, "Fine-tune a model on instruction records; the loss is on the answers.")


def main(argv: list[str] | None = None) -> None:
    """`python -m superfiltering.train`, for launchers; the same as the verb `train` of `superfiltering`."""
    run_module("superfiltering.train", train_command, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    main()
