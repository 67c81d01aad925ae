"""The training behind `ressa repair`: transformers' Trainer with the loss from data and from the dense model.

It imports what the extra [train] installs.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback

from model_hooks.errors import RequestError
from model_hooks.loading import quiet
from paper_tables import progress, trainer
from paper_tables.errors import WorkFailed
from paper_tables.launch import is_main_process
from paper_tables.training import LOG
from ressa.data import Example
from ressa.distill import NO_FEATURES, Objective, has_features
from ressa.encoding import Encoder, collate, encoder_of
from ressa.sharding import gathered, loaded_whole, prepare_for_splitting
from ressa.teachercache import KEYS, Answers, Cache
from ressa.train import RepairConfig

TRAINABLE = "trainable.safetensors"
Teach = Callable[[dict[str, Tensor]], Any]


def arguments(config: RepairConfig, deepspeed: str | None) -> Any:
    """The Trainer's arguments; `deepspeed` is a file. Making them joins this process to the others of its launcher."""
    own: dict[str, Any] = {
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    }
    return trainer.arguments(config, deepspeed, "ressa", **own)


class Rows(Dataset[dict[str, Tensor]]):
    """Examples, encoded when they are asked for: images of a whole data set are not held in memory.

    left_out: places that are passed over. cache: of a teacher, whose answers go with each example's inputs.
    """

    def __init__(
        self, encoder: Encoder, examples: Sequence[Example], left_out: Sequence[int] = (), cache: Cache | None = None
    ) -> None:
        self.encoder, self.examples, self.cache = encoder, examples, cache
        passed = set(left_out)
        self.places = [i for i in range(len(examples)) if i not in passed]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        place = self.places[index]
        row = self.encoder.encode(self.examples[place])
        return row if self.cache is None else row | self.cache.of(place, row)


class RessaTrainer(trainer.WholeCheckpoints, Trainer):
    """Trainer whose loss is the paper's (1 - w) L_task + w L_KD, and whose checkpoints hold what is trained alone.

    objective: a `distill.Objective`. teach: from what the model is given to the teacher's output, or None.
    """

    def __init__(
        self, objective: Any, teach: Teach | None, log: Path, encoder_decoder: bool = False, **options: Any
    ) -> None:
        self.objective, self.teach, self.encoder_decoder = objective, teach, encoder_decoder
        self.parts: dict[str, float] = {}
        super().__init__(**options)
        self.model_accepts_loss_kwargs = False  # the objective is a mean already
        self.remove_callback(PrinterCallback)
        self.add_callback(trainer.Log(log))

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs["labels"]
        if not self.encoder_decoder:  # a model that makes its decoder's inputs of the labels needs them
            inputs = {name: value for name, value in inputs.items() if name != "labels"}
        taught: Any = None
        if KEYS[0] in inputs:
            taught = Answers(*(inputs[key] for key in KEYS))
            inputs = {name: value for name, value in inputs.items() if name not in KEYS}
        elif self.teach is not None:
            with torch.no_grad():
                taught = self.teach(inputs)
        output = model(**inputs, use_cache=False)
        loss, parts = self.objective(output, taught, labels, inputs)
        if not bool(torch.isfinite(loss)):
            raise WorkFailed(
                f"the training loss became {float(loss.detach())} in step {self.state.global_step + 1}; checkpoints up "
                f"to step {self._kept()} are kept in {self.args.output_dir}: lower --learning-rate"
            )
        self.parts = {name: float(value) for name, value in parts.items()}
        return (loss, output) if return_outputs else loss

    def _kept(self) -> int:
        found = [int(p.name.rpartition("-")[2]) for p in Path(self.args.output_dir).glob("checkpoint-*")]
        return max(found, default=0)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log({**logs, **(self.parts if "loss" in logs else {})}, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if output_dir is None or self.is_deepspeed_enabled:  # DeepSpeed's own checkpoint holds them
            return
        if self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_file(trainable(self.model), Path(output_dir) / TRAINABLE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        set_trainable(self.model, load_file(Path(resume_from_checkpoint) / TRAINABLE))


class _ExactAtTheEnd(TrainerCallback):
    """Of `backward` auto: the last tenth of the steps has exact gradients."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        from ressa.adapters import set_backward

        set_backward(model, "exact" if state.global_step >= 0.9 * state.max_steps else "ste")


def trainable(model: Any) -> dict[str, Tensor]:
    """What is trained, by name, on the CPU."""
    return {n: p.detach().cpu().clone() for n, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def set_trainable(model: Any, weights: dict[str, Tensor]) -> None:
    """Put back what `trainable` gave. Raises RuntimeError where that is not what this model trains."""
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if own.keys() != weights.keys():
        raise RuntimeError(
            f"the checkpoint holds {len(weights)} trained tensors, the model has {len(own)}, not the same"
        )
    for name, parameter in own.items():
        parameter.copy_(weights[name])


def mask_gradients(model: Any, masks: dict[str, Tensor]) -> None:
    """Train the pruned weights themselves, and nothing else: their zeros get no gradient, so AdamW leaves them at zero.

    Needs no weight decay, which keeps zeros too.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for path, mask in masks.items():
        weight = model.get_submodule(path).weight
        weight.requires_grad_(True)
        weight.register_hook(partial(_masked, mask.to(weight.device)))


def _masked(mask: Tensor, gradient: Tensor) -> Tensor:
    return gradient.masked_fill(~mask, 0)


def run(
    config: RepairConfig, arguments: Any, model: Any, teach: Teach | None, rows: Any, encoder: Encoder
) -> dict[str, Any]:
    """Train what of `model` asks for gradients. Returns steps, loss, trainable and seconds; the model is in eval mode.

    Raises `WorkFailed` where the loss is no number any more; `RequestError` before the first step where the model's
    output lacks what `feature_weight` compares.
    """
    if config.feature_weight and not has_features(model):
        raise RequestError(NO_FEATURES)
    began = time.monotonic()
    checkpoint = trainer.checkpoint_of(config)
    with quiet(), progress("training steps") as bar:
        callbacks = [trainer.Progress(bar), *([_ExactAtTheEnd()] if config.backward == "auto" else [])]
        tuner = RessaTrainer(
            objective_of(config, encoder), teach, config.work / LOG, encoder.encoder_decoder, model=model,
            args=arguments, train_dataset=rows,
            data_collator=partial(collate, pad=encoder.pad), callbacks=callbacks,
        )  # fmt: skip
        tuner.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    model.eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    losses = [entry["loss"] for entry in tuner.state.log_history if "loss" in entry]
    loss = losses[-1] if losses else tuner.state.log_history[-1].get("train_loss", math.nan)
    with gathered(trained):
        finite, count = all(bool(p.isfinite().all()) for p in trained), sum(p.numel() for p in trained)
    if not finite:
        raise WorkFailed("a trained weight became infinite or NaN; nothing was written: lower --learning-rate")
    return {"steps": tuner.state.global_step, "loss": loss, "trainable": count, "seconds": time.monotonic() - began}


def objective_of(config: RepairConfig, encoder: Encoder) -> Any:
    """The loss that `config` asks for."""
    return Objective(
        kl_weight=config.kl_weight, temperature=config.temperature, positions=config.positions,
        loss_mode=config.loss_mode, feature_weight=config.feature_weight, image_token_id=encoder.image_token_id,
        shift=not encoder.encoder_decoder,
    )  # fmt: skip


def fit(config: RepairConfig, arguments: Any) -> tuple[dict[str, Any], Callable[[Path], None]]:
    """Train as `config` says; what `repair` returns, and what writes the output. Every process calls it, and that too.

    Raises `RequestError` and `WorkFailed`, as `repair` says.
    """
    from ressa.branches import find_branches
    from ressa.folders import load_base

    set_seed(config.seed)
    with loaded_whole(arguments):
        base = load_base(config.model, config.wanted_teacher, torch.bfloat16 if config.bf16 else torch.float32)
    encoder = encoder_of(base.model.config, base.processor, config.max_length)
    examples = config.examples()
    cache = Cache(config.teacher_cache) if config.teacher_cache else None
    rows = Rows(encoder, examples, config.record()["left_out"], cache)
    branches = find_branches(base.model)
    model, teach, write = prepared(config, base, branches)
    if arguments.deepspeed_plugin is not None and arguments.deepspeed_plugin.zero_stage == 3:
        prepare_for_splitting(model, teach is not None)
    result = run(config, arguments, model, teach, rows, encoder)
    return {"output": config.output, "examples": len(rows), **result}, write


def prepared(config: RepairConfig, base: Any, branches: Any) -> tuple[Any, Teach | None, Callable[[Path], None]]:
    """The model to train, its teacher, and what writes the result: every process calls that, and the first writes."""
    if config.method == "full":
        return _full(config, base)
    from ressa.adapters import attach
    from ressa.teacher import dense

    model = attach(
        base.model, base.masks, rank=config.ranks, alpha=config.alpha, branches=branches, backward=config.backward,
        seed=config.seed, dense=base.held,
    )  # fmt: skip

    def teach(inputs: dict[str, Tensor]) -> Any:
        with dense(model, config.teacher_kind):
            return model(**inputs, use_cache=False)

    def write(folder: Path) -> None:
        for adapter in model.peft_config.values():
            adapter.base_model_name_or_path = config.model  # also where the weights were a teacher's
        with gathered(p for p in model.parameters() if p.requires_grad):
            if is_main_process():
                model.save_pretrained(str(folder))

    return model, teach if base.dense else None, write


def _full(config: RepairConfig, base: Any) -> tuple[Any, Teach | None, Callable[[Path], None]]:
    """All pruned weights are trained, their zeros kept; the teacher is a copy, since the weights themselves move."""
    from ressa import merging

    model = base.model
    teach = _copied(model, base.held) if base.dense else None
    apply_masks(model, base.masks)
    mask_gradients(model, base.masks)

    def write(folder: Path) -> None:
        apply_masks(model, base.masks)
        if is_main_process():
            merging.save(model, folder, base.processor)

    return model, teach, write


def _copied(model: Any, held: dict[str, Tensor]) -> Teach:
    """A copy of the model, with these weights, as its teacher."""
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    for path, weight in held.items():
        teacher.get_submodule(path).weight.data.copy_(weight)
    return lambda inputs: teacher(**inputs, use_cache=False)


@torch.no_grad()
def apply_masks(model: Any, masks: dict[str, Tensor]) -> None:
    """Put zeros where the masks say so."""
    for path, mask in masks.items():
        weight = model.get_submodule(path).weight
        weight.masked_fill_(~mask.to(weight.device), 0)
