"""The training loop of `superfiltering.train`: TRL's SFTTrainer on prompts and completions.

Every process runs it. It imports what the extra [train] installs, so it is imported where that is known to be there.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
from datasets import Dataset
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from instruct_data.records import read
from instruct_data.templates import template
from model_hooks import RequestError, load
from model_hooks.loading import quiet
from paper_tables import WorkFailed, progress, trainer
from paper_tables.training import LOG

if TYPE_CHECKING:
    from superfiltering.train import TrainConfig


def rows_of(config: TrainConfig, tokenizer: Any) -> Dataset:
    """A row for every assistant turn: `prompt` with its history, `completion` the answer; not those without one.

    Raises `RequestError` where no record has an answer.
    """
    prompt = template(config.template, tokenizer)
    rows = [
        {"prompt": prompt(example), "completion": example.response}
        for record in read(config.data, config.schema) for example in record.examples if example.response
    ]  # fmt: skip
    if not rows:
        raise RequestError(f"no record of {config.data} has an answer: there is nothing to learn")
    return Dataset.from_list(rows)


def arguments(config: TrainConfig, deepspeed: str | None) -> SFTConfig:
    """The trainer's arguments; `deepspeed` is a file. Making them joins this process to the others of its launcher."""
    own = {
        "max_length": config.max_length, "completion_only_loss": True, "data_seed": config.seed,
        "logging_nan_inf_filter": False,
    }  # fmt: skip
    options: SFTConfig = trainer.arguments(config, deepspeed, "superfiltering", SFTConfig, **own)
    return options


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without the bars of `datasets`, of which TRL shows one for every step of its preparation."""
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bar()


def trainer_of(
    config: TrainConfig, options: SFTConfig, model: Any, tokenizer: Any, rows: Dataset, *callbacks: Any
) -> SFTTrainer:
    """TRL's trainer, what has no token of an answer left within `max_length` dropped.

    Raises `RequestError` where that is everything.
    """
    made = SFTTrainer(model, options, train_dataset=rows, processing_class=tokenizer, callbacks=list(callbacks))
    if not len(made.train_dataset):
        with suppress(OSError):  # Trainer has made it; it stays where it holds a run
            config.work.rmdir()
        raise RequestError(
            f"none of {len(rows)} answers has a token within --max-length {config.max_length} tokens; give a larger one"
        )
    made.remove_callback(PrinterCallback)
    return made


def fit(config: TrainConfig, deepspeed: str | None) -> dict[str, Any]:
    """Train, and write the weights, gathered, to the work folder. Returns what `train` does."""
    from superfiltering.train import begin

    began = time.monotonic()
    options = arguments(config, deepspeed)  # before the model, since ZeRO-3 cuts what loads
    with quiet(), _no_bars(), progress("training steps") as bar:
        model, tokenizer = load(config.model, dtype="bfloat16" if config.bf16 and deepspeed else "float32")
        rows = rows_of(config, tokenizer)
        made = trainer_of(config, options, model, tokenizer, rows, trainer.Progress(bar))
        begin(config, hashlib.blake2b(json.dumps(rows.to_list()).encode(), digest_size=8).hexdigest())
        last = trainer.checkpoint_of(config)
        made.train(resume_from_checkpoint=None if last is None else str(last))
        losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
        loss = float(losses[-1]) if losses else float(made.state.log_history[-1].get("train_loss", math.nan))
        if not math.isfinite(loss):
            raise WorkFailed(f"the training loss became {loss}; nothing was written: lower --learning-rate")
        if made.is_world_process_zero():  # a run that went on has the entries from before too
            log = "".join(json.dumps(entry) + "\n" for entry in made.state.log_history)
            (Path(config.work) / LOG).write_text(log)
        made.save_model(str(Path(config.work) / "trained"))
    return {
        "output": config.output, "records": len(made.train_dataset), "steps": made.state.global_step,
        "loss": loss, "seconds": time.monotonic() - began,
    }  # fmt: skip
