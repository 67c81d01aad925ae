"""The training loop of `llm_drop.train`: transformers' Trainer with a loss that can look at the undropped parent.

Every process runs it. It imports what the extra [train] installs, so it is imported where that is known to be there.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, Trainer
from transformers.integrations.deepspeed import deepspeed_config, is_deepspeed_zero3_enabled
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import get_model_param_count
from transformers.utils import CONFIG_NAME

from llm_drop.prepare import DATA, START, TRAINED
from model_hooks.loading import quiet
from model_hooks.lora import add_lora
from paper_tables import WorkFailed, progress, trainer
from paper_tables.training import LOG

if TYPE_CHECKING:
    from llm_drop.train import TrainConfig

CHUNK = 1024  # positions whose float32 logits are held at once


def healing_loss(logits: Tensor, ids: Tensor, parent_logits: Tensor | None = None, weight: float = 0.0) -> Tensor:
    """`(1 - weight) * cross-entropy of the next token + weight * KL(parent || student)`, in nats.

    Args:
        logits, parent_logits: [batch, T, vocabulary], any dtype; computed with in float32, `CHUNK` positions at a time.
        ids: [batch, T].

    Returns:
        The mean over the `batch * (T - 1)` predictions that have a next token.
    """
    batch, length = ids.shape
    total = logits.new_zeros((), dtype=torch.float32)
    for row in range(batch):
        for start in range(0, length - 1, CHUNK):
            here = slice(start, min(start + CHUNK, length - 1))
            parent = None if parent_logits is None else parent_logits[row, here]
            parts = (logits[row, here], ids[row, here.start + 1 : here.stop + 1], parent, weight)
            total = total + checkpoint(_sum_of_losses, *parts, use_reentrant=False, preserve_rng_state=False)
    return total / (batch * (length - 1))


def _sum_of_losses(logits: Tensor, targets: Tensor, parent_logits: Tensor | None, weight: float) -> Tensor:
    log_q = logits.float().log_softmax(-1)  # [positions, vocabulary]
    loss = F.nll_loss(log_q, targets, reduction="sum")
    if parent_logits is None:
        return loss
    log_p = parent_logits.float().log_softmax(-1)
    return (1 - weight) * loss + weight * F.kl_div(log_q, log_p, reduction="sum", log_target=True)


class Healer(trainer.WholeCheckpoints, Trainer):
    """Trainer with `healing_loss`. `parent` is a frozen model, or None; evaluation is on the next token alone."""

    def __init__(self, parent: nn.Module | None, weight: float, log: Path, **kwargs: Any) -> None:
        super().__init__(data_collator=trainer.collate, **kwargs)
        self.parent, self.weight = parent, weight
        self.model_accepts_loss_kwargs = False  # all sequences are equally long: a mean of means is the mean
        self.remove_callback(PrinterCallback)
        self.add_callback(trainer.Log(log))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        ids = inputs["input_ids"]
        logits = model(input_ids=ids, use_cache=False).logits
        parent_logits, weight = None, 0.0
        if self.weight and torch.is_grad_enabled():  # DeepSpeed's engine says that it is training when it is not
            assert self.parent is not None
            with torch.no_grad():
                parent_logits, weight = self.parent(input_ids=ids, use_cache=False).logits, self.weight
        loss = healing_loss(logits, ids, parent_logits, weight)
        return (loss, {}) if return_outputs else loss

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load adapters. A whole model was built from the checkpoint, whose config Trainer's own way could not read."""
        if not (Path(resume_from_checkpoint) / CONFIG_NAME).is_file():
            super()._load_from_checkpoint(resume_from_checkpoint, model)


def load_parent(source: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The frozen parent, whole on `device`, or cut over the processes where ZeRO-3 cuts the student."""
    parent = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    parent.eval().requires_grad_(False)
    if not is_deepspeed_zero3_enabled():
        return parent.to(device)
    import deepspeed

    zero = {k: v for k, v in deepspeed_config()["zero_optimization"].items() if k in ("stage", "offload_param")}
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    engine, *_ = deepspeed.initialize(model=parent, config=settings | {"bf16": {"enabled": dtype == torch.bfloat16}})
    return engine


def arguments(config: TrainConfig, deepspeed: str | None) -> Any:
    """The Trainer's arguments; `deepspeed` is a file. Making them joins this process to the others of its launcher."""
    own: dict[str, Any] = {"eval_on_start": True, "prediction_loss_only": True, "remove_unused_columns": False}
    if config.fsdp:
        own |= {
            "fsdp": True, "gradient_checkpointing": False,
            "fsdp_config": {"version": 2, "activation_checkpointing": config.gradient_checkpointing},
        }  # fmt: skip
    return trainer.arguments(config, deepspeed, "llm-drop", **own)


def _model(config: TrainConfig, prepared: dict[str, Any], source: str, deepspeed: bool) -> Any:
    """The student as Trainer gets it: in float32 unless its weights are frozen or DeepSpeed keeps a float32 copy."""
    sharded = config.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"
    halved = config.bf16 and not sharded and (config.method == "lora" or deepspeed)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16 if halved else torch.float32)
    if config.method == "full":
        return model
    return add_lora(
        model, prepared["modules"], prepared["banks"], rank=config.rank, alpha=config.alpha, seed=config.seed
    )


def heal(config: TrainConfig, prepared: dict[str, Any], arguments: Any) -> dict[str, Any]:
    """Train, and write the weights, gathered, to the work folder. Returns what `train` does."""
    data = load_file(config.work / DATA)
    checkpoint = trainer.checkpoint_of(config)
    arguments.eval_on_start = checkpoint is None  # the loss before training is in the checkpoint's log
    start = prepared["start"] or str(config.work / START)
    goes_on = checkpoint is not None and (checkpoint / CONFIG_NAME).is_file()
    began = time.monotonic()
    with quiet(), progress("training steps") as bar:
        source = str(checkpoint) if goes_on else start
        model = _model(config, prepared, source, deepspeed=arguments.deepspeed_plugin is not None)
        parent = load_parent(prepared["parent"], model.dtype, arguments.device) if config.distill else None
        healer = Healer(
            parent, config.distill, config.work / LOG, model=model, args=arguments,
            train_dataset=list(data["train"]), eval_dataset=list(data["heldout"]), callbacks=[trainer.Progress(bar)],
        )  # fmt: skip
        healer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        after = healer.evaluate()["eval_loss"]
        before = next(entry["eval_loss"] for entry in healer.state.log_history if "eval_loss" in entry)
        if not math.isfinite(after):
            raise WorkFailed(f"the held-out loss became {after}; nothing was written: lower --learning-rate")
        healer.save_model(str(config.work / TRAINED))
    steps, trainable = healer.state.global_step, get_model_param_count(healer.model, trainable_only=True)
    adapters = trainable if config.method == "lora" else 0
    return {
        "output": config.output,
        "steps": steps,
        "tokens": steps * config.batch_size * config.accumulation * arguments.world_size * config.length,
        "loss_before": before,
        "loss_after": after,
        "parameters": get_model_param_count(healer.model) - adapters,
        "trainable": trainable,
        "seconds": time.monotonic() - began,
    }
