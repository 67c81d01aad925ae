"""transformers' Trainer as every package here runs it: arguments, the bar, the log, the checkpoint to go on from.

It imports what an extra [train] installs, so it is imported where that is known to be there.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainingArguments

from .frame import require
from .launch import last_checkpoint, on_cpu
from .training import Run


def arguments(
    run: Run, deepspeed: str | None, package: str, kind: type[TrainingArguments] = TrainingArguments, **own: Any
) -> Any:
    """The Trainer's arguments, of class `kind`; `deepspeed` is a file, `own` are further ones of the package.

    Making them joins this process to the others of its launcher.
    """
    cpu = on_cpu()
    given: dict[str, Any] = {
        "output_dir": str(run.work),
        "per_device_train_batch_size": run.batch_size,
        "per_device_eval_batch_size": run.batch_size,
        "gradient_accumulation_steps": run.accumulation,
        "num_train_epochs": run.epochs,
        "max_steps": run.max_steps or -1,
        "learning_rate": run.rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": run.warmup,
        "weight_decay": run.weight_decay,
        "gradient_checkpointing": run.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "bf16": run.bf16,
        "deepspeed": deepspeed,
        "save_steps": run.save_every,
        "save_total_limit": 2,
        "logging_steps": run.log_every,
        "seed": run.seed,
        "use_cpu": cpu,
        "dataloader_pin_memory": not cpu,
        "ddp_backend": "gloo" if cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
        "ddp_timeout": 7200,  # the others wait while the first process prepares, and at the end writes, a large model
        "disable_tqdm": True,
        "report_to": "none",
    }
    options = kind(**given | own)
    if deepspeed:  # loading under ZeRO-3 comes before Trainer would do this
        # of torch 2.14, about calls that DeepSpeed makes many times a step
        warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
        if cpu:  # DeepSpeed would compile for half a minute, to do what gloo does
            require("deepspeed.ops", extra="train", package=package).__compatible_ops__["deepspeed_shm_comm"] = False
        require("deepspeed.comm", extra="train", package=package).init_distributed(auto_mpi_discovery=False)
    options._n_gpu = min(options.n_gpu, 1)  # more GPUs are for a launcher: never torch's old DataParallel
    return options


def checkpoint_of(run: Run) -> Path | None:
    """The checkpoint to go on from, the same in every process; None for a run that begins."""
    found: Path | None = broadcast_object_list([last_checkpoint(run.work) if run.resume else None])[0]
    return found


def collate(rows: list[Any]) -> dict[str, Any]:
    """Sequences [T] as a batch. Trainer scores only what has labels; models shift them themselves."""
    import torch

    ids = torch.stack(rows)  # [batch, T]
    return {"input_ids": ids, "labels": ids}


class WholeCheckpoints:
    """For a trainer, before its class: the file by which a checkpoint is known as whole waits for all processes' files.

    transformers writes trainer_state.json next, in the first process, whatever the others have written by then.
    """

    accelerator: Any

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)  # type: ignore[misc]
        self.accelerator.wait_for_everyone()


class Log(TrainerCallback):  # type: ignore[misc]
    """Keeps the log as JSON lines. A run that goes on begins with the lines that its checkpoint knows of."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.path.write_text("".join(json.dumps(entry) + "\n" for entry in state.log_history))

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            with self.path.open("a") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")


class Progress(TrainerCallback):  # type: ignore[misc]
    """Moves a bar, `bar(steps done, steps)`."""

    def __init__(self, bar: Callable[[float, float], None]) -> None:
        self.bar = bar

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar(state.global_step, state.max_steps)
