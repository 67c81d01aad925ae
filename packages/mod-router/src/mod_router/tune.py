"""Router-Tuning: train the routers of a frozen model, and nothing else.

    mod-router tune --model zoo:llama --output routers --target-capacity 0.6
    torchrun --nproc-per-node 8 -m mod_router.tune --config tune.yaml --model BASE --output routers
    accelerate launch -m mod_router.tune ...        deepspeed --module mod_router.tune ...

The first process loads the model, finds the gates, makes the examples and writes all that into a work folder beside the
output (`routers.training`); then every process loads from there. A killed run goes on from its last checkpoint when the
same command is given again. With several machines, the output lies on a disk that all of them see.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from mod_router.config import RouterConfig
from model_hooks.errors import RequestError
from paper_tables.errors import nearest
from paper_tables.launch import deepspeed_file, is_main_process, on_cpu, run_module
from paper_tables.options import command_of
from paper_tables.training import LOG, Run, prepare, refuse_longer_than_context, split

RECIPES = {"ours": 2e-2, "paper": 1e-5}  # with their learning rates
DATA = "data.safetensors"
MEANS = 256  # examples on which the means of repair are taken


@dataclass(frozen=True)
class TuneConfig(Run):
    """What to put routers on, with what to train them, and how.

    Args:
        model: Hub id, checkpoint folder or zoo:NAME; it is not written to.
        output: Folder for the routers: kilobytes, for this model.
        recipe: ours (reach a target capacity) or paper (MindSkip as published: a linear price on open gates).
        layers: last:N, last (half of the layers), numbers and ranges such as 3,5,8-11, or auto:N with --scores.
        scores: With auto: a file that llm-drop score wrote.
        unit: What a gate skips: attention, mlp or block.
        level: sequence (one decision for a whole sequence) or token (each token its own).
        pool: What decides: prompt_mean, masked_mean, last or ema; empty: the recipe's.
        target_capacity: Share of (sequence, layer) pairs that run.
        penalty: The paper's lambda, with recipe paper.
        noise: Standard deviation of noise on router logits at the start; negative: the recipe's (1 for ours, else 0).
        distill: Share of the loss that is KL from the ungated model; negative: the recipe's (1 for ours, 0 for paper).
        repair: What a skipped unit adds instead: none (the paper's), or mean (of what it adds on the training data).
        lora_rank: Above 0, also train LoRA of this rank on the attentions and feed-forwards, together with the routers.
        lora_rate: Learning rate of LoRA.
        cheap_train: Do not compute skipped rows in training: faster, and closed gates get no gradient.
        calibrate: At the end move the threshold so that the target is met on training prompts (recipe ours).
        data: Text (zoo:train, a file, a hub dataset) or instruction records.
        kind: Of the data: auto, text or records.
        template: Of the prompts of records: none, alpaca, vicuna or chat.
        samples: Examples to train on, fewer where the data has fewer.
        length: Most tokens of each; at most the model's context.
        heldout: Data to measure on; empty: the last examples of the data, which are then not trained on.
        heldout_samples: Examples of it.
        learning_rate: Peak, after which it falls as a cosine; 0: the recipe's.
        fsdp: Cut the model over the processes by PyTorch's FSDP2. Needs a launcher.
        seed: Of the cuts between prompt and rest, the order of the data and the noise.

    Raises:
        RequestError: a value is not accepted.
    """

    recipe: str = "ours"
    layers: str = "last"
    scores: str = ""
    unit: str = "attention"
    level: str = "sequence"
    pool: str = ""
    target_capacity: float = 0.6
    penalty: float = 0.0
    noise: float = -1.0
    distill: float = -1.0
    repair: str = "none"
    lora_rank: int = 0
    lora_rate: float = 1e-4
    cheap_train: bool = False
    calibrate: bool = True
    data: str = "zoo:train"
    kind: str = "auto"
    template: str = "none"
    samples: int = 1000
    length: int = 512
    heldout: str = ""
    heldout_samples: int = 100
    fsdp: bool = False
    batch_size: int = 8
    save_every: int = 50
    log_every: int = 5

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise RequestError(f"recipe {self.recipe!r} is not accepted{nearest(self.recipe, RECIPES)}")
        super().__post_init__()
        self.at_least(1, "samples", "heldout_samples")
        self.at_least(2, "length")
        self.at_least(0, "lora_rank", "lora_rate")
        if self.deepspeed and self.fsdp:
            raise RequestError("deepspeed and fsdp both cut the model; give one of them")
        if self.fsdp:
            self.needs_launcher("fsdp")
            if on_cpu():
                raise RequestError(
                    "fsdp: accelerate cuts models over GPUs only, and there is none; --deepspeed zero3 can on CPU"
                )
        _ = self.routing  # checked now, not when the model is loaded

    @cached_property
    def routing(self) -> RouterConfig:
        """What is gated and what it is trained for."""
        paper = self.recipe == "paper"
        return RouterConfig(
            layers=self.layers, scores=self.scores, unit=self.unit, level=self.level,  # type: ignore[arg-type]
            pool=self.pool or ("masked_mean" if paper else "prompt_mean"),  # type: ignore[arg-type]
            objective="paper" if paper else "capacity", target_capacity=self.target_capacity, penalty=self.penalty,
            cheap_train=self.cheap_train or paper,
            repair=self.repair,  # type: ignore[arg-type]
            noise=self.noise if self.noise >= 0 else 0.0 if paper else 1.0,
            distill=self.distill if self.distill >= 0 else 0.0 if paper else 1.0,
        )  # fmt: skip

    @property
    def rate(self) -> float:
        """The learning rate's peak."""
        return self.learning_rate or RECIPES[self.recipe]


def tune(config: TuneConfig) -> dict[str, Any]:
    """Train routers as `config` says and write them; call it in every process of a launcher.

    Returns:
        output, steps, trainable (parameters trained), tau, capacity and usage on held-out data, loss and base_loss
        (held-out, nats a token after the prompt, routed and ungated), cost (their difference) with its standard error,
        kl, seconds.

    Raises:
        RequestError: the request cannot be met; nothing is written.
        WorkFailed: the loss is no number any more; the checkpoints are kept, the output is not written.
    """
    from model_hooks.files import refuse_existing, refuse_overlap
    from paper_tables.frame import require

    needed = {"accelerate": True, "datasets": True, "deepspeed": config.deepspeed, "peft": config.lora_rank}
    for module in [name for name, wanted in needed.items() if wanted]:
        require(module, extra="train", package="mod-router")
    refuse_existing(config.output, config.overwrite)
    refuse_overlap(config.output, config.model)
    deepspeed = deepspeed_file(__file__, config.deepspeed)
    if is_main_process():
        prepare(config, partial(make_start, config))
    from accelerate import PartialState

    from mod_router import tuning

    arguments = tuning.arguments(config, deepspeed)  # joins the other processes
    PartialState().wait_for_everyone()
    prepared = config.record()
    result, weights = tuning.fit(config, prepared, arguments)
    if is_main_process():
        _finish(config, prepared, result, weights)
    PartialState().wait_for_everyone()
    return result


def make_start(config: TuneConfig, part: Path) -> dict[str, Any]:
    """Write the examples to the folder `part`; returns what the run must know of the model and its gates."""
    from safetensors.torch import save_file

    from mod_router.attaching import attach
    from mod_router.checkpoint import identity
    from mod_router.data import to_tensors
    from mod_router.gate import runtime_of
    from mod_router.merged import describe
    from mod_router.repair import measure_means
    from model_hooks import load
    from model_hooks.loading import resolve
    from model_hooks.lora import lora_targets
    from model_hooks.structure import anatomy

    model, tokenizer = load(config.model)
    train, heldout = examples(config, model, tokenizer)
    base = {"name": config.model, **identity(model)}
    modules, banks = lora_targets(anatomy(model)) if config.lora_rank else ([], [])
    means = measure_means(model, config.routing, train[:MEANS]) if config.repair == "mean" else {}
    attach(model, config.routing)
    tensors = {f"{name}.{k}": v for name, rows in (("train", train), ("heldout", heldout))
               for k, v in to_tensors(rows).items()}  # fmt: skip
    tensors |= {f"means.{layer}": mean for layer, mean in means.items()}
    save_file(tensors, part / DATA)
    return {
        "source": resolve(config.model), "base": base, "routing": describe(runtime_of(model)),
        "dtype": str(model.dtype).removeprefix("torch."), "pad": tokenizer.pad_token_id or 0,
        "modules": modules, "banks": banks,
    }  # fmt: skip


def examples(config: TuneConfig, model: Any, tokenizer: Any) -> tuple[list[Any], list[Any]]:
    """Training and held-out examples. Raises `RequestError` where there are too few."""
    from mod_router.data import read_examples

    refuse_longer_than_context(config, model)
    how: dict[str, Any] = {
        "length": config.length,
        "kind": config.kind,
        "template": config.template,
        "seed": config.seed,
    }
    if config.heldout:
        heldout = read_examples(config.heldout, tokenizer, samples=config.heldout_samples, **how)
        return read_examples(config.data, tokenizer, samples=config.samples, **how), heldout
    found = read_examples(config.data, tokenizer, samples=config.samples + config.heldout_samples, **how)
    return split(config, found, "examples")


def _finish(config: TuneConfig, prepared: dict[str, Any], result: dict[str, Any], weights: dict[int, Any]) -> None:
    from dataclasses import replace

    from safetensors.torch import load_file

    from mod_router.checkpoint import LORA, write
    from model_hooks.files import atomic_write

    routing = replace(config.routing, tau=result["tau"])
    measured = {k: result[k] for k in ("capacity", "loss", "base_loss", "cost", "cost_se", "kl", "steps")}
    means = {int(k.split(".")[1]): v for k, v in load_file(config.work / DATA).items() if k.startswith("means.")}
    lora = config.work / LORA if config.lora_rank else None
    write(config.output, routing, weights, prepared["base"], measured, config.overwrite, means=means, lora=lora)
    atomic_write(config.output / LOG, (config.work / LOG).read_text())
    shutil.rmtree(config.work)


tune_command = command_of(
    TuneConfig, tune, "Train routers on a frozen model, on one device or many: only routers change."
)


def main(argv: list[str] | None = None) -> None:
    """`python -m mod_router.tune`, for launchers; the same as the verb `tune` of `mod-router`."""
    run_module("mod_router.tune", tune_command, sys.argv[1:] if argv is None else argv, "Train routers.")


if __name__ == "__main__":
    main()
