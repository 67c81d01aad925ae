"""The training loop of `meo.train`: transformers' Trainer with the balance loss; every process runs it.

It imports what the extra [train] installs, so it is imported where that is known to be there.
"""

from __future__ import annotations

import inspect
import math
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer, Trainer, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import get_model_param_count

from model_hooks.loading import quiet
from paper_tables import WorkFailed, progress, trainer
from paper_tables.training import LOG

from .balancing import move_biases
from .classes import is_merged
from .context import Seen, gating
from .converting import banks
from .data import collate
from .train import START, TRAINED, read_rows
from .workflow import load_for

if TYPE_CHECKING:
    from .train import TrainConfig

GATES = ("w_gate", "w_noise", "first")


class BalancedTrainer(trainer.WholeCheckpoints, Trainer):
    """Trainer whose loss is the task's and the gates' balance; the log tells the latter apart."""

    def __init__(self, *args: Any, decay_experts: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.decay_experts = decay_experts
        self.model_accepts_loss_kwargs = False  # so that the loss of each batch, balance and all, is divided alike
        self.balance: list[float] = []
        self.seen: list[Seen] = []  # in this step
        self.uncached = {"use_cache": False} if "use_cache" in inspect.signature(self.model.forward).parameters else {}

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        with gating() as seen:
            outputs = model(**inputs, **self.uncached)
            balance = seen.loss
        self.balance.append(float(balance.detach()))
        if seen.chosen:
            self.seen.append(seen)
        loss = outputs.loss + balance
        return (loss, outputs) if return_outputs else loss

    def get_decay_parameter_names(self, model: Any, *args: Any, **kwargs: Any) -> list[str]:
        names: list[str] = super().get_decay_parameter_names(model, *args, **kwargs)
        if self.decay_experts or not is_merged(self.model):
            return names
        own = tuple(f"{name}." for name in banks(self.model))
        return [name for name in names if not name.startswith(own)]

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            move_biases(*self.seen)
            self.seen.clear()
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        found, self.balance = self.balance, []
        super().log({**logs, **({"balance": sum(found) / len(found)} if found else {})}, *args, **kwargs)


def choose(model: Any, parts: str) -> None:
    """Freeze all but what is to be trained: all, experts, gates or peft; and a head of its own."""
    if parts == "all":
        return
    body = getattr(model, model.base_model_prefix, None)
    inside = {id(p) for p in body.parameters()} if isinstance(body, torch.nn.Module) else set()
    for parameter in model.parameters():
        parameter.requires_grad_(bool(inside) and id(parameter) not in inside)
    for bank in banks(model).values():
        for name, parameter in bank.named_parameters():
            small = name.startswith("token.") or name in ("down", "up")
            parameter.requires_grad_(parts == "experts" or name in GATES or (parts == "peft" and small))


def arguments(config: TrainConfig, deepspeed: str | None) -> Any:
    """The Trainer's arguments; `deepspeed` is a file. Making them joins this process to the others of its launcher."""
    own: dict[str, Any] = {"remove_unused_columns": False, "label_names": ["labels"]}
    if config.fsdp:  # it checkpoints activations itself
        fsdp = {"version": 2, "activation_checkpointing": config.gradient_checkpointing}
        own |= {"fsdp": True, "fsdp_config": fsdp, "gradient_checkpointing": False}
    return trainer.arguments(config, deepspeed, "meo", **own)


def fit(config: TrainConfig, arguments: Any) -> dict[str, Any]:
    """Train, and write the weights, gathered, to the work folder."""
    checkpoint = trainer.checkpoint_of(config)
    start = str(config.work / START)
    began = time.monotonic()
    set_seed(config.seed)
    with quiet(), progress("training steps") as bar:
        dtype = torch.bfloat16 if config.bf16 and arguments.deepspeed_plugin is not None else torch.float32
        model, _ = load_for(start, config.kind, None, dtype=dtype, tokenizer="")
        choose(model, config.parts)
        rows = read_rows(config.work / "train.jsonl")
        tokenizer = AutoTokenizer.from_pretrained(start)
        tuner = BalancedTrainer(
            model=model, args=arguments, train_dataset=rows, decay_experts=config.decay_experts,
            data_collator=partial(collate, kind=config.kind, tokenizer=tokenizer),
            callbacks=[trainer.Progress(bar), trainer.Log(config.work / LOG)],
        )  # fmt: skip
        tuner.remove_callback(PrinterCallback)
        tuner.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        losses = [entry["loss"] for entry in tuner.state.log_history if "loss" in entry]
        if losses and not math.isfinite(losses[-1]):
            raise WorkFailed(f"the loss became {losses[-1]}; nothing was written: lower --learning-rate")
        tuner.save_model(str(config.work / TRAINED))
    return {
        "output": config.output, "steps": tuner.state.global_step,
        "parameters": get_model_param_count(tuner.model),
        "trainable": get_model_param_count(tuner.model, trainable_only=True),
        "seconds": time.monotonic() - began,
    }  # fmt: skip
