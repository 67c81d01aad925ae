"""The training loop of `mod_router.tune`: transformers' Trainer with the router's loss; every process runs it.

It imports what the extra [train] installs, so it is imported where that is known to be there.
"""

from __future__ import annotations

import json
import math
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback

from model_hooks.loading import quiet
from model_hooks.lora import add_lora
from paper_tables import WorkFailed, progress, trainer
from paper_tables.launch import is_main_process
from paper_tables.training import LOG

from .attaching import install_all, routers
from .checkpoint import LORA, weight_digests
from .config import RouterConfig
from .context import routing_context
from .data import collate, from_tensors
from .gate import ROUTER, GateSpec, Runtime, runtime_of
from .measuring import calibrate, measure, ungated_model
from .objective import Multiplier, paper_penalty, token_losses
from .repair import set_means
from .sharding import by_fsdp, put, whole
from .tune import DATA

if TYPE_CHECKING:
    from .tune import TuneConfig

ROUTERS, DUAL = "routers.safetensors", "multiplier.json"


class RouterTrainer(trainer.WholeCheckpoints, Trainer):
    """Trainer whose loss is the routers' and whose checkpoints hold the routers alone (and the optimizer's state)."""

    def __init__(
        self, routing: RouterConfig, multiplier: Multiplier, log: Path, lora_rate: float = 0.0, **kwargs: Any
    ) -> None:
        self.optimizer: Any = None
        super().__init__(**kwargs)
        self.routing, self.multiplier, self.lora_rate = routing, multiplier, lora_rate
        self.shares: list[float] = []  # of what ran, since the last optimizer step
        self.model_accepts_loss_kwargs = False
        self.remove_callback(PrinterCallback)
        self.add_callback(_Ascent(self))
        self.add_callback(trainer.Log(log))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        pool, labels = inputs.pop("pool_mask"), inputs.pop("labels")
        teacher = None
        if self.routing.distill:
            with torch.no_grad(), ungated_model(self.model):
                teacher = model(**inputs, use_cache=False).logits
        with routing_context(pool_mask=pool, train=True, noise=self._noise()) as seen:
            logits = model(**inputs, use_cache=False).logits
            loss = token_losses(logits, labels, teacher, self.routing.distill).mean()
            used = _over_processes(seen.capacity)
            self.shares.append(float(used.detach()))
            if self.routing.objective == "paper":
                loss = loss + paper_penalty(seen, self.routing.penalty)
            else:
                loss = loss + self.multiplier.penalty(used)
        return (loss, {}) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> Any:
        """Two learning rates: routers begin at zero and end far from it, LoRA adapts weights that are good already."""
        model = self.model if model is None else model
        lora = lora_parameters(model)
        if self.optimizer is None and lora:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            own = [router.weight for router in routers(model).values()]
            groups = [{"params": own}, {"params": list(lora.values()), "lr": self.lora_rate}]
            self.optimizer = kind(groups, weight_decay=self.args.weight_decay, **options)
        return super().create_optimizer(model)

    def _noise(self) -> float:
        return self.routing.noise * (1 - self.state.global_step / max(1, self.state.max_steps))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        mean = self.multiplier.mean
        super().log({**logs, **({"capacity": mean} if mean is not None else {})}, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        weights, lora = gathered(self.model), whole(lora_parameters(self.model))
        if output_dir and self.args.should_save:
            folder = Path(output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_file({str(layer): weight for layer, weight in weights.items()} | lora, folder / ROUTERS)
            (folder / DUAL).write_text(json.dumps([self.multiplier.nu, self.multiplier.mean]))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        found = load_file(Path(resume_from_checkpoint) / ROUTERS)
        for layer, router in routers(self.model).items():
            put(router.weight, found[str(layer)])
        for name, parameter in lora_parameters(self.model).items():
            put(parameter, found[name])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.multiplier.nu, self.multiplier.mean = json.loads((Path(checkpoint) / DUAL).read_text())


class _Ascent(TrainerCallback):
    """Moves the multiplier after each optimizer step."""

    def __init__(self, trainer: RouterTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        shares, self.trainer.shares = self.trainer.shares, []
        self.trainer.multiplier.step(sum(shares) / max(1, len(shares)))


def _over_processes(used: Tensor) -> Tensor:
    """The mean of all processes' `used`, with the gradient of this one's (DDP means the gradients)."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return used
    mean = used.detach().clone()
    distributed.all_reduce(mean)
    return used + (mean / distributed.get_world_size() - used.detach())


def gathered(model: Any) -> dict[int, Tensor]:
    """layer -> router weight [1, H], float32 on the CPU, whole."""
    return whole({layer: router.weight for layer, router in routers(model).items()})


def lora_parameters(model: Any) -> dict[str, Tensor]:
    """Names and parameters of LoRA on the model; {} without."""
    return {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}


def only_routers(model: Any) -> int:
    """Freeze everything but the routers and LoRA; how many parameters these have. Raises RuntimeError if another would
    train."""
    own = {id(router.weight) for router in routers(model).values()}
    own |= {id(parameter) for parameter in lora_parameters(model).values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in own)
    allowed = lora_parameters(model)
    wrong = [n for n, p in model.named_parameters()
             if p.requires_grad and not n.endswith(f"{ROUTER}.weight") and n not in allowed]  # fmt: skip
    if wrong:
        raise RuntimeError(f"{wrong[0]} would be trained too; a router shares its weight with it")
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)


def arguments(config: TuneConfig, deepspeed: str | None) -> Any:
    """The Trainer's arguments; `deepspeed` is a file. Making them joins this process to the others of its launcher."""
    own: dict[str, Any] = {"remove_unused_columns": False}
    if config.fsdp:
        own |= {
            "fsdp": True, "gradient_checkpointing": False,
            "fsdp_config": {"version": 2, "activation_checkpointing": config.gradient_checkpointing},
        }  # fmt: skip
    return trainer.arguments(config, deepspeed, "mod-router", **own)


def _model(config: TuneConfig, prepared: dict[str, Any], means: dict[int, Tensor], deepspeed: bool) -> Any:
    """The frozen base with routers at zero where the first process found their places, and LoRA if it is asked for."""
    from model_hooks import load

    dtype = torch.bfloat16 if config.bf16 and not by_fsdp(config.fsdp) else torch.float32  # FSDP cuts one dtype
    if deepspeed:  # under ZeRO-3 each process must load through from_pretrained alone
        model = AutoModelForCausalLM.from_pretrained(prepared["source"], dtype=dtype)
    else:
        model, _ = load(prepared["source"], dtype=dtype, tokenizer=False)
    record = prepared["routing"]
    where = {k: record[k] for k in ("depth", "decoder", "hidden_size", "row_dim")}
    settings = RouterConfig(**{**record["config"], "layers": tuple(record["config"]["layers"])})
    install_all(model, Runtime(settings, tuple(GateSpec(**s) for s in record["gates"]), **where))
    if deepspeed and config.bf16:
        for router in routers(model).values():  # DeepSpeed takes one dtype; its optimizer keeps a float32 copy
            router.to(torch.bfloat16)
    set_means(model, means)
    if config.lora_rank:
        how: dict[str, Any] = {"rank": config.lora_rank, "alpha": 2 * config.lora_rank, "seed": config.seed}
        model = add_lora(model, prepared["modules"], prepared["banks"], **how)
    return model


def fit(config: TuneConfig, prepared: dict[str, Any], arguments: Any) -> tuple[dict[str, Any], dict[int, Tensor]]:
    """Train; what `tune` returns, and the routers' weights. Everything but the routers is as it was, and is checked."""
    data = load_file(config.work / DATA)
    train, heldout = ({k.split(".")[1]: v for k, v in data.items() if k.startswith(name)} for name in ("train", "held"))
    rows, held = from_tensors(train), from_tensors(heldout)
    means = {int(k.split(".")[1]): v for k, v in data.items() if k.startswith("means.")}
    checkpoint = trainer.checkpoint_of(config)
    began = time.monotonic()
    set_seed(config.seed)
    deepspeed = arguments.deepspeed_plugin is not None
    with quiet(), progress("training steps") as bar:
        model = _model(config, prepared, means, deepspeed)
        trainable = only_routers(model)
        before = None if deepspeed or by_fsdp(config.fsdp) else weight_digests(model)
        tuner = RouterTrainer(
            config.routing, Multiplier(config.target_capacity), config.work / LOG, config.lora_rate, model=model,
            args=arguments, train_dataset=rows, data_collator=partial(collate, pad=prepared["pad"]),
            callbacks=[trainer.Progress(bar)],
        )  # fmt: skip
        tuner.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        model.train(False)
        runtime_of(model).last = None
        weights = gathered(model)
        lora = whole(lora_parameters(model))
        if not all(bool(weight.isfinite().all()) for weight in (*weights.values(), *lora.values())):
            raise WorkFailed("a router became infinite or NaN; nothing was written: lower --learning-rate")
        if before is not None and weight_digests(model) != before:
            raise RuntimeError("weights of the base changed in training; nothing was written: please report it")
        if lora and is_main_process():
            _write_lora(config, model, lora)
        runner = tuner.model_wrapped if deepspeed else None
        if config.recipe == "ours" and config.calibrate:
            calibrate(model, rows[: max(256, len(held))], config.target_capacity, runner=runner)
        found = measure(model, held, runner=runner)
    if not math.isfinite(float(found.loss.mean())):
        raise WorkFailed(f"the held-out loss is {float(found.loss.mean())}; nothing was written")
    return _result(config, tuner, found, trainable, time.monotonic() - began), weights


def _write_lora(config: TuneConfig, model: Any, weights: dict[str, Tensor]) -> None:
    """The adapter as PEFT's own folder in the work folder."""
    from peft import get_peft_model_state_dict

    folder = config.work / LORA
    folder.mkdir(exist_ok=True)
    settings = model.peft_config["default"]
    settings.base_model_name_or_path, settings.inference_mode = config.model, True
    settings.save_pretrained(folder)
    state = get_peft_model_state_dict(model, state_dict=weights, save_embedding_layers=False)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "adapter_model.safetensors")


def _result(config: TuneConfig, tuner: Any, found: Any, trainable: int, seconds: float) -> dict[str, Any]:
    return {
        "output": config.output, "steps": tuner.state.global_step, "trainable": trainable,
        "tau": runtime_of(tuner.model).config.tau, "capacity": found.capacity, "loss": float(found.loss.mean()),
        "base_loss": float(found.base.mean()), "cost": found.cost["value"], "cost_se": found.cost["se"],
        "kl": float(found.kl.mean()), "usage": {layer: float(used.mean()) for layer, used in found.used.items()},
        "seconds": seconds,
    }  # fmt: skip
