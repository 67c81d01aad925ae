"""Fine-tune a model on instruction records, those selected say, by TRL's SFTTrainer; the loss is on the answers alone.

    superfiltering train --model zoo:llama --data selected.jsonl --output student
    torchrun --nproc-per-node 8 -m superfiltering.train --config configs/sft.yaml --model MODEL --data DATA --output OUT
    accelerate launch -m superfiltering.train ...        deepspeed --module superfiltering.train ...

A killed run goes on from its last checkpoint, in a folder beside the output (`student.training`), when the same
command is given again. The result is an ordinary checkpoint folder with a model card.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from model_hooks import RequestError
from paper_tables.launch import deepspeed_file, is_main_process, run_module
from paper_tables.options import command_of

SETTINGS = "settings.json"
FREE = ("output", "resume", "overwrite", "save_every", "log_every")  # may change when a run goes on


@dataclass(frozen=True)
class TrainConfig:
    """What to fine-tune, on what, and how.

    Args:
        model: Hub id, checkpoint folder or zoo:NAME.
        data: Records: a file, a folder of datasets, a hub name or zoo:pairs.
        output: Folder for the student: an ordinary checkpoint with a model card.
        template: How a record becomes a prompt: none, alpaca, vicuna or chat.
        schema: Of the records; auto tells it from the first.
        max_length: Tokens of prompt and answer; what is longer is cut.
        epochs: Times that the data is seen.
        max_steps: Optimizer steps; 0: as the epochs say.
        learning_rate: Peak, after which it falls as a cosine.
        warmup: Share of the steps in which the learning rate rises.
        weight_decay: Of AdamW.
        batch_size: Records a device holds at once.
        accumulation: Batches to a step.
        gradient_checkpointing: Compute activations twice instead of holding them.
        bf16: Compute in bfloat16.
        deepspeed: zero2, zero3, zero3-offload or a file; needs a launcher (torchrun, deepspeed).
        save_every: Steps between checkpoints.
        log_every: Steps between lines of training_log.jsonl.
        seed: Of the order of the records.
        resume: Go on from the last checkpoint of a run that was stopped; --no-resume begins again.
        overwrite: Replace what is at the output.

    Raises:
        RequestError: a value is not accepted.
    """

    model: str
    data: str
    output: Path
    template: str = "alpaca"
    schema: str = "auto"
    max_length: int = 2048
    epochs: float = 3.0
    max_steps: int = 0
    learning_rate: float = 2e-5
    warmup: float = 0.03
    weight_decay: float = 0.0
    batch_size: int = 1
    accumulation: int = 128
    gradient_checkpointing: bool = False
    bf16: bool = False
    deepspeed: str = ""
    save_every: int = 100
    log_every: int = 10
    seed: int = 0
    resume: bool = True
    overwrite: bool = False

    def __post_init__(self) -> None:
        least = {"max_length": 2, "batch_size": 1, "accumulation": 1, "save_every": 1, "log_every": 1,
                 "max_steps": 0, "weight_decay": 0, "warmup": 0}  # fmt: skip
        for name, bound in least.items():
            if not bound <= getattr(self, name) < math.inf:
                raise RequestError(f"{name} is {getattr(self, name)}; at least {bound} is needed")
        for name in ("epochs", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise RequestError(f"{name} is {getattr(self, name)}; a number above 0 is needed")
        if self.warmup >= 1:
            raise RequestError(f"warmup is {self.warmup}; a share of the steps, below 1, is needed")
        if self.deepspeed and "RANK" not in os.environ:
            raise RequestError("deepspeed needs a launcher: torchrun --nproc-per-node N -m superfiltering.train ...")

    @property
    def work(self) -> Path:
        """Where the run keeps its checkpoints until it is done."""
        return self.output.with_name(f"{self.output.name}.training")

    def settings(self) -> dict[str, Any]:
        """What decides the result: a run goes on only with the same."""
        values = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items() if k not in FREE}
        return values | {"processes": int(os.environ.get("WORLD_SIZE", "1"))}


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
    _check_goes_on(config)
    from accelerate import PartialState

    from superfiltering.sft import fit

    result = fit(config, deepspeed)
    if is_main_process():
        _finish(config, result)
    PartialState().wait_for_everyone()
    return result


def _check_goes_on(config: TrainConfig) -> None:
    """Raise `RequestError` where the work folder holds another run, or what is no run."""
    record = config.work / SETTINGS
    if config.work.exists() and not record.is_file() and any(config.work.iterdir()):
        raise RequestError(f"{config.work} is in the way: checkpoints go there; move it or rename --output")
    if record.is_file() and config.resume:
        then, now = json.loads(record.read_text()), config.settings()
        if changed := [k for k in now if now[k] != then.get(k)]:
            raise RequestError(
                f"{config.work} holds a run with {changed[0]} {then.get(changed[0])!r}, not {now[changed[0]]!r}; "
                "give the same, or --no-resume to begin again"
            )


def begin(config: TrainConfig, content: str) -> None:
    """Write down what the run is, `content` a hash of its data; nothing of a request that failed before is left.

    Raises `RequestError` where a run that is to go on was on other data.
    """
    from model_hooks.files import atomic_write

    record = config.work / SETTINGS
    if config.resume and record.is_file():
        if json.loads(record.read_text()).get("content") != content:
            raise RequestError(
                f"{config.work} holds a run on other records than {config.data} has now; --no-resume begins again"
            )
    elif is_main_process():
        shutil.rmtree(config.work, ignore_errors=True)
        atomic_write(record, json.dumps({**config.settings(), "content": content}, indent=1) + "\n")


def _finish(config: TrainConfig, result: dict[str, Any]) -> None:
    """Write the output from the trained weights; one process, whole tensors."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from model_hooks import Card, load, save
    from model_hooks.files import atomic_write
    from superfiltering.sft import LOG

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
