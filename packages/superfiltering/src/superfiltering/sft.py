"""The training loop of `superfiltering.train`: TRL's SFTTrainer on prompts and completions.

Every process runs it. It imports what the extra [train] installs, so it is imported where that is known to be there.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers.trainer_callback import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from instruct_data.records import read
from instruct_data.templates import template
from model_hooks import RequestError, load
from model_hooks.loading import quiet
from paper_tables import WorkFailed, progress
from paper_tables.frame import require
from paper_tables.launch import last_checkpoint

if TYPE_CHECKING:
    from superfiltering.train import TrainConfig


LOG = "training_log.jsonl"


class _Bar(TrainerCallback):
    def __init__(self, bar: Any) -> None:
        self.bar = bar

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar(state.global_step, state.max_steps)


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
    cpu = not torch.accelerator.is_available()
    options = SFTConfig(
        output_dir=str(config.work), max_length=config.max_length, per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation, num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1, learning_rate=config.learning_rate, lr_scheduler_type="cosine",
        warmup_steps=config.warmup, weight_decay=config.weight_decay, bf16=config.bf16,
        gradient_checkpointing=config.gradient_checkpointing, deepspeed=deepspeed, save_steps=config.save_every,
        save_total_limit=2, logging_steps=config.log_every, seed=config.seed, data_seed=config.seed, use_cpu=cpu,
        ddp_backend="gloo" if cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
        logging_nan_inf_filter=False, disable_tqdm=True, report_to="none", completion_only_loss=True,
        dataloader_pin_memory=not cpu,
        ddp_timeout=7200,  # the others wait while the first process writes a large model at the end
    )  # fmt: skip
    if deepspeed:  # loading under ZeRO-3 comes before Trainer would do this
        # of torch 2.14, about calls that DeepSpeed makes many times a step
        warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
        require("deepspeed.comm", extra="train", package="superfiltering").init_distributed(auto_mpi_discovery=False)
    options._n_gpu = min(options.n_gpu, 1)  # more GPUs are for a launcher: never torch's old DataParallel
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
    trainer = SFTTrainer(model, options, train_dataset=rows, processing_class=tokenizer, callbacks=list(callbacks))
    if not len(trainer.train_dataset):
        with suppress(OSError):  # Trainer has made it; it stays where it holds a run
            config.work.rmdir()
        raise RequestError(
            f"none of {len(rows)} answers has a token within --max-length {config.max_length} tokens; give a larger one"
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def fit(config: TrainConfig, deepspeed: str | None) -> dict[str, Any]:
    """Train, and write the weights, gathered, to the work folder. Returns what `train` does."""
    from superfiltering.train import begin

    began = time.monotonic()
    options = arguments(config, deepspeed)  # before the model, since ZeRO-3 cuts what loads
    with quiet(), _no_bars(), progress("training steps") as bar:
        model, tokenizer = load(config.model, dtype="bfloat16" if config.bf16 and deepspeed else "float32")
        rows = rows_of(config, tokenizer)
        trainer = trainer_of(config, options, model, tokenizer, rows, _Bar(bar))
        begin(config, hashlib.blake2b(json.dumps(rows.to_list()).encode(), digest_size=8).hexdigest())
        last = broadcast_object_list([last_checkpoint(config.work) if config.resume else None])[0]
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        loss = float(losses[-1]) if losses else float(trainer.state.log_history[-1].get("train_loss", math.nan))
        if not math.isfinite(loss):
            raise WorkFailed(f"the training loss became {loss}; nothing was written: lower --learning-rate")
        if trainer.is_world_process_zero():  # a run that went on has the entries from before too
            log = "".join(json.dumps(entry) + "\n" for entry in trainer.state.log_history)
            (Path(config.work) / LOG).write_text(log)
        trainer.save_model(str(Path(config.work) / "trained"))
    return {
        "output": config.output, "records": len(trainer.train_dataset), "steps": trainer.state.global_step,
        "loss": loss, "seconds": time.monotonic() - began,
    }  # fmt: skip
