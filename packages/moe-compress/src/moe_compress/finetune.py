"""Finetune a trimmed model: LoRA on attention, shared experts and the fused experts, merged at the end; or all weights.

    moe-compress finetune --model trimmed --output tuned
    torchrun --nproc-per-node 8 -m moe_compress.finetune --config configs/lora.yaml --model trimmed --output tuned
    accelerate launch -m moe_compress.finetune ...

The first process packs the data into a work folder beside the output; then every process loads from there. A killed run
goes on from its last checkpoint when the same command is given again.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_hooks.errors import RequestError
from moe_compress.presets import with_preset
from paper_tables.errors import WorkFailed, nearest
from paper_tables.launch import deepspeed_file, is_main_process, run_module
from paper_tables.options import command_of
from paper_tables.training import LOG, Run, prepare, token_sequences

if TYPE_CHECKING:
    from model_hooks import Card

METHODS = {"lora": 2e-4, "full": 1e-5}  # with their usual learning rates
DATA, TRAINED = "data.safetensors", "trained"


@dataclass(frozen=True)
class TuneConfig(Run):
    """What to finetune, on what, and how.

    Args:
        model: Hub id, checkpoint folder or zoo:NAME; trimmed perhaps, not pruned or quantised.
        output: Folder for the result: an ordinary checkpoint with a model card.
        method: lora (adapters on attention and experts, merged at the end) or full (all weights).
        rank: Rank of the adapters.
        alpha: Their scale is alpha / rank.
        data: Text: a file, a hub dataset (owner/name[:config[:split]]) or zoo:PART.
        samples: Sequences to train on, fewer where the text is shorter.
        length: Tokens of each; at most the model's context.
        heldout: Text to measure the loss on; empty: sequences of the data that are kept out of training.
        heldout_samples: Sequences of it.
        learning_rate: Peak, after which it falls as a cosine; 0: 2e-4 for lora, 1e-5 for full.

    Raises:
        RequestError: a value is not accepted.
    """

    method: str = "lora"
    rank: int = 32
    alpha: int = 64
    data: str = "zoo:train"
    samples: int = 4096
    length: int = 1024
    heldout: str = ""
    heldout_samples: int = 32
    accumulation: int = 16

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise RequestError(f"method {self.method!r} is not accepted{nearest(self.method, METHODS)}")
        super().__post_init__()
        self.at_least(1, "rank", "alpha", "samples", "heldout_samples")
        self.at_least(2, "length")

    @property
    def rate(self) -> float:
        """The learning rate's peak."""
        return self.learning_rate or METHODS[self.method]


def finetune(config: TuneConfig) -> dict[str, Any]:
    """Finetune as `config` says and write the result; call it in every process of a launcher.

    Returns:
        output, steps, loss_before and loss_after (held-out, nats a token), trainable parameters, seconds.

    Raises:
        RequestError: the request cannot be met, nothing is written. Slimmed models are refused: training would fill
            zeros and move rounded weights; finetune first.
        WorkFailed: the loss is no number any more; nothing is written.
    """
    from model_hooks.files import refuse_existing, refuse_overlap
    from paper_tables.frame import require

    extras = {"accelerate": True, "peft": config.method == "lora", "deepspeed": bool(config.deepspeed)}
    for module in (name for name, needed in extras.items() if needed):
        require(module, extra="train", package="moe-compress")
    refuse_existing(config.output, config.overwrite)
    refuse_overlap(config.output, config.model)
    _refuse_slimmed(config.model)
    deepspeed = deepspeed_file(__file__, config.deepspeed)
    if is_main_process():
        prepare(config, partial(_start, config))
    from accelerate import PartialState

    from paper_tables import trainer

    own: dict[str, Any] = {"eval_on_start": True, "prediction_loss_only": True, "remove_unused_columns": False}
    arguments = trainer.arguments(config, deepspeed, "moe-compress", **own)  # joins the other processes
    PartialState().wait_for_everyone()
    result = _train(config, config.record(), arguments)
    if is_main_process():
        _finish(config, config.record(), result)
    PartialState().wait_for_everyone()
    return result


def _refuse_slimmed(model: str) -> None:
    from moe_compress.streaming import REPORT

    file = Path(model) / REPORT
    if file.is_file():
        method = json.loads(file.read_text())["settings"]["method"]
        raise RequestError(f"{model} was slimmed by {method}, which training would undo; finetune first, then slim")


def _start(config: TuneConfig, part: Path) -> dict[str, Any]:
    """Write the data to `part`; what every process must know of the model."""
    from safetensors.torch import save_file

    from model_hooks import anatomy, load
    from model_hooks.experts import moe_layers
    from model_hooks.lora import lora_targets

    model, tokenizer = load(config.model)
    parts = anatomy(model)
    moe_layers(parts)  # refuses a dense model
    save_file(token_sequences(config, model, tokenizer), part / DATA)
    modules, banks = lora_targets(parts) if config.method == "lora" else ([], [])
    uneven = bool((getattr(model.config, "lean", None) or {}).get("experts"))
    return {"dtype": str(model.dtype).removeprefix("torch."), "modules": modules, "banks": banks, "uneven": uneven}


def _train(config: TuneConfig, prepared: dict[str, Any], arguments: Any) -> dict[str, Any]:
    """Train, and write the weights, gathered, to the work folder."""
    import torch
    from safetensors.torch import load_file
    from transformers import Trainer
    from transformers.trainer_callback import PrinterCallback
    from transformers.trainer_pt_utils import get_model_param_count

    from model_hooks.loading import quiet
    from model_hooks.lora import add_lora
    from paper_tables import progress, trainer

    data, checkpoint = load_file(config.work / DATA), trainer.checkpoint_of(config)
    arguments.eval_on_start = checkpoint is None  # the loss before training is in the checkpoint's log
    halved = config.bf16 and (config.method == "lora" or arguments.deepspeed_plugin is not None)
    began = time.monotonic()
    with quiet(), progress("training steps") as bar:
        model = _load(config, torch.bfloat16 if halved else torch.float32, prepared["uneven"], arguments)
        if config.method == "lora":
            adapters = {"rank": config.rank, "alpha": config.alpha, "seed": config.seed}
            model = add_lora(model, prepared["modules"], prepared["banks"], **adapters)
        tuner = Trainer(
            model=model, args=arguments, data_collator=trainer.collate, train_dataset=list(data["train"]),
            eval_dataset=list(data["heldout"]), callbacks=[trainer.Progress(bar), trainer.Log(config.work / LOG)],
        )  # fmt: skip
        tuner.model_accepts_loss_kwargs = False  # all sequences are equally long: a mean of means is the mean
        tuner.remove_callback(PrinterCallback)
        tuner.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        after = tuner.evaluate()["eval_loss"]
        before = next(entry["eval_loss"] for entry in tuner.state.log_history if "eval_loss" in entry)
        if not math.isfinite(after):
            raise WorkFailed(f"the held-out loss became {after}; nothing was written: lower --learning-rate")
        tuner.save_model(str(config.work / TRAINED))
    return {
        "output": config.output,
        "steps": tuner.state.global_step,
        "loss_before": before,
        "loss_after": after,
        "trainable": get_model_param_count(tuner.model, trainable_only=True),
        "seconds": time.monotonic() - began,
    }


def _load(config: TuneConfig, dtype: Any, uneven: bool, arguments: Any) -> Any:
    """The model to train. Under ZeRO-3 each process builds its own part alone, but where layers have other numbers of
    experts: they are cut to size as they are built, which needs whole weights, so ZeRO-3 cuts the model up later."""
    from transformers import AutoModelForCausalLM
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    from model_hooks.loading import resolve

    deepspeed = getattr(arguments, "hf_deepspeed_config", None)
    if uneven and deepspeed is not None:
        unset_hf_deepspeed_config()
    try:
        return AutoModelForCausalLM.from_pretrained(resolve(config.model), dtype=dtype)
    finally:
        if uneven and deepspeed is not None:
            set_hf_deepspeed_config(deepspeed)


def _finish(config: TuneConfig, prepared: dict[str, Any], result: dict[str, Any]) -> None:
    """Write the output; one process, whole tensors."""
    import torch
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from model_hooks import load, save
    from model_hooks.files import atomic_write

    unset_hf_deepspeed_config()  # else ZeRO-3 would cut what is loaded now
    dtype = getattr(torch, prepared["dtype"])
    source = config.model if config.method == "lora" else config.work / TRAINED
    model, tokenizer = load(source, dtype=dtype, tokenizer=config.method == "lora")
    if config.method == "lora":
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, config.work / TRAINED).merge_and_unload()
    else:
        from model_hooks.loading import load_tokenizer

        tokenizer = load_tokenizer(config.model)
    save(model, config.output, tokenizer, card=_card(config, result), overwrite=config.overwrite, source=config.model)
    atomic_write(config.output / LOG, (config.work / LOG).read_text())
    shutil.rmtree(config.work)


def _card(config: TuneConfig, result: dict[str, Any]) -> Card:
    from model_hooks import Card

    how = f"LoRA of rank {config.rank}" if config.method == "lora" else "all weights trained"
    measured = {
        "held-out loss before training (nats a token)": result["loss_before"],
        "held-out loss after training (nats a token)": result["loss_after"],
        "steps": result["steps"],
    }
    done = f"moe-compress: finetuned on {config.data} ({how})"
    return Card(config.model, done, "arXiv 2406.02500", measured, config.settings())


finetune_command = with_preset(
    command_of(TuneConfig, finetune, "Finetune a trimmed model: LoRA on attention and experts, or all."), "finetune"
)


def main(argv: list[str] | None = None) -> None:
    """`python -m moe_compress.finetune`, for launchers; the same as the verb `finetune` of `moe-compress`."""
    arguments = sys.argv[1:] if argv is None else argv
    run_module("moe_compress.finetune", finetune_command, arguments, "Finetune a trimmed model.")


if __name__ == "__main__":
    main()
