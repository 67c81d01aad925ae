"""The training loop of `superfiltering.train`: TRL's SFTTrainer on prompts and completions.

Every process runs it. It imports what the extra [train] installs, so it is imported where that is known to be there.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from transformers.trainer_callback import PrinterCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from instruct_data.records import read
from instruct_data.templates import template
from model_hooks import load
from model_hooks.loading import quiet
from paper_tables import WorkFailed, progress

if TYPE_CHECKING:
    from superfiltering.train import TrainConfig


class _Bar(TrainerCallback):
    def __init__(self, bar: Any) -> None:
        self.bar = bar

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar(state.global_step, state.max_steps)


def rows_of(config: TrainConfig, tokenizer: Any) -> Dataset:
    """A row for every assistant turn: `prompt` with its history, `completion` the answer; not those without one."""
    prompt = template(config.template, tokenizer)
    rows = [
        {"prompt": prompt(example), "completion": example.response}
        for record in read(config.data, config.schema) for example in record.examples if example.response
    ]  # fmt: skip
    return Dataset.from_list(rows)


def arguments(config: TrainConfig, deepspeed: str | None) -> SFTConfig:
    cpu = not torch.accelerator.is_available()
    return SFTConfig(
        output_dir=str(config.work), max_length=config.max_length, per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation, num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1, learning_rate=config.learning_rate, lr_scheduler_type="cosine",
        warmup_steps=config.warmup, weight_decay=config.weight_decay, bf16=config.bf16,
        gradient_checkpointing=config.gradient_checkpointing, deepspeed=deepspeed, save_steps=config.save_every,
        save_total_limit=2, logging_steps=config.log_every, seed=config.seed, data_seed=config.seed, use_cpu=cpu,
        ddp_backend="gloo" if cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
        disable_tqdm=True, report_to="none", completion_only_loss=True, dataloader_pin_memory=not cpu,
    )  # fmt: skip


def fit(config: TrainConfig, deepspeed: str | None) -> dict[str, Any]:
    """Train, and write the weights, gathered, to the work folder. Returns what `train` does."""
    began = time.monotonic()
    options = arguments(config, deepspeed)  # before the model: joins the other processes, and ZeRO-3 cuts what loads
    options._n_gpu = min(options.n_gpu, 1)  # more GPUs are for a launcher: never torch's old DataParallel
    with quiet(), progress("training steps") as bar:
        model, tokenizer = load(config.model, dtype="bfloat16" if config.bf16 and deepspeed else "float32")
        rows = rows_of(config, tokenizer)
        trainer = SFTTrainer(model, options, train_dataset=rows, processing_class=tokenizer, callbacks=[_Bar(bar)])
        trainer.remove_callback(PrinterCallback)
        last = get_last_checkpoint(str(config.work)) if config.resume else None
        trainer.train(resume_from_checkpoint=last)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        loss = float(losses[-1]) if losses else float(trainer.state.log_history[-1].get("train_loss", math.nan))
        if not math.isfinite(loss):
            raise WorkFailed(f"the training loss became {loss}; nothing was written: lower --learning-rate")
        trainer.save_model(str(Path(config.work) / "trained"))
    return {
        "output": config.output, "records": len(rows), "steps": trainer.state.global_step, "loss": loss,
        "seconds": time.monotonic() - began,
    }  # fmt: skip
