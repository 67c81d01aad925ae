"""Heal a dropped model: a short training, with LoRA or of all weights, that wins back what the drop cost.

    llm-drop train --model zoo:llama --plan plan.json --output healed
    torchrun --nproc-per-node 8 -m llm_drop.train --config heal-lora.yaml --model dropped --output healed
    accelerate launch -m llm_drop.train ...        deepspeed --module llm_drop.train ...

The first process loads the model, drops, packs the data and writes all that into a work folder beside the output
(`healed.training`); then every process loads from there. A killed run goes on from its last checkpoint when the same
command is given again. With several machines, the output lies on a disk that all of them see.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_drop.prepare import START, TRAINED, make_start
from model_hooks import RequestError
from paper_tables.errors import nearest
from paper_tables.launch import deepspeed_file, is_main_process, on_cpu, run_module
from paper_tables.options import command_of
from paper_tables.training import LOG, Run, prepare

if TYPE_CHECKING:
    from model_hooks import Card

METHODS = {"lora": 2e-4, "full": 1e-5}  # with their usual learning rates


@dataclass(frozen=True)
class TrainConfig(Run):
    """What to heal, with what, and how.

    Args:
        model: Hub id, checkpoint folder or zoo:NAME; it may be dropped already.
        output: Folder for the healed model: an ordinary checkpoint with a model card.
        plan: Plan file; what it names is dropped before training.
        method: lora (adapters on every linear layer of attention and MLP, merged at the end) or full (all weights).
        rank: Rank of the adapters.
        alpha: Their scale is alpha / rank.
        keep_adapter: Save the adapter alone, for the model as it was given, instead of merging it.
        distill: Weight, 0 to 1, of the KL divergence from the parent's predictions; next-token loss has the rest.
        parent: The undropped model to distill from, if it is not --model (as it is with --plan).
        data: Text: a file, a hub dataset (owner/name[:config[:split]]) or zoo:PART.
        samples: Sequences to train on, fewer where the text is shorter.
        length: Tokens of each; at most the model's context.
        heldout: Text to measure the loss on; empty: sequences of the data that are kept out of training.
        heldout_samples: Sequences of it.
        learning_rate: Peak, after which it falls as a cosine; 0: 2e-4 for lora, 1e-5 for full.
        batch_size: Sequences a process takes at once.
        deepspeed: zero2, zero3, zero3-offload, or a DeepSpeed file of your own; empty: none.
        fsdp: Cut the model over the processes by PyTorch's FSDP2.
        seed: Of the adapters and the order of the data.

    Raises:
        RequestError: a value is not accepted.
    """

    plan: Path | None = None
    method: str = "lora"
    rank: int = 16
    alpha: int = 32
    keep_adapter: bool = False
    distill: float = 0.0
    parent: str = ""
    data: str = "zoo:train"
    samples: int = 4096
    length: int = 1024
    heldout: str = ""
    heldout_samples: int = 32
    accumulation: int = 16
    fsdp: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise RequestError(f"method {self.method!r} is not accepted{nearest(self.method, METHODS)}")
        super().__post_init__()
        self.at_least(1, "rank", "alpha", "samples", "heldout_samples")
        self.at_least(2, "length")
        self.at_least(0, "distill")
        if self.distill > 1:
            raise RequestError(f"distill is {self.distill}; it is a share of 1")
        if self.distill and not (self.parent or self.plan):
            raise RequestError("distill needs the undropped model: give --parent, or drop with --plan in the same run")
        if self.keep_adapter and (self.method != "lora" or self.plan):
            raise RequestError("keep_adapter needs --method lora and a --model that is dropped already (llm-drop drop)")
        if self.deepspeed and self.fsdp:
            raise RequestError("deepspeed and fsdp both cut the model; give one of them")
        if self.fsdp:
            self.needs_launcher("fsdp")
        if self.fsdp and on_cpu():
            raise RequestError(
                "fsdp: accelerate cuts models over GPUs only, and there is none; --deepspeed zero3 can on CPU"
            )

    @property
    def rate(self) -> float:
        """The learning rate's peak."""
        return self.learning_rate or METHODS[self.method]

    @property
    def undropped(self) -> str:
        """The parent to distill from; empty without distillation."""
        return (self.parent or self.model) if self.distill else ""


def train(config: TrainConfig) -> dict[str, Any]:
    """Heal as `config` says and write the result; call it in every process of a launcher.

    Returns:
        output, steps, tokens (trained on), loss_before and loss_after (held-out, nats a token), parameters, trainable
        (how many of them), seconds.

    Raises:
        RequestError: the request cannot be met; nothing is written.
        WorkFailed: the loss is no number any more; the checkpoints are kept, the output is not written.
    """
    from model_hooks.files import refuse_existing, refuse_overlap
    from paper_tables.frame import require

    extras = {"accelerate": True, "peft": config.method == "lora", "deepspeed": bool(config.deepspeed)}
    for module in (name for name, needed in extras.items() if needed):
        require(module, extra="train", package="llm-drop")
    refuse_existing(config.output, config.overwrite)
    refuse_overlap(config.output, config.model)
    deepspeed = deepspeed_file(__file__, config.deepspeed)
    if is_main_process():
        prepare(config, partial(make_start, config))
    from accelerate import PartialState

    from llm_drop import healing

    arguments = healing.arguments(config, deepspeed)  # joins the other processes
    PartialState().wait_for_everyone()
    prepared = config.record()
    result = healing.heal(config, prepared, arguments)
    if is_main_process():
        _finish(config, prepared, result)
    PartialState().wait_for_everyone()
    return result


def _finish(config: TrainConfig, prepared: dict[str, Any], result: dict[str, Any]) -> None:
    """Write the output from the start and the trained weights; one process, whole tensors."""
    import torch
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from model_hooks import load, save
    from model_hooks.files import atomic_folder, atomic_write

    unset_hf_deepspeed_config()  # else ZeRO-3 would cut what is loaded now
    dtype = getattr(torch, prepared["dtype"])
    model, tokenizer = load(prepared["start"] or config.work / START, dtype=dtype)
    card = _card(config, prepared, result)
    if config.method == "full":
        model, _ = load(config.work / TRAINED, dtype=dtype, tokenizer=False)
    else:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, config.work / TRAINED)
        if config.keep_adapter:
            with atomic_folder(config.output, config.overwrite) as part:
                model.save_pretrained(str(part))
                (part / "README.md").write_text(card.markdown(model))
        else:
            model = model.merge_and_unload()
    if not config.keep_adapter:
        save(model, config.output, tokenizer, card=card, overwrite=config.overwrite, source=config.model)
    log = (config.work / LOG).read_text()
    atomic_write(config.output / LOG, log)
    shutil.rmtree(config.work)


def _card(config: TrainConfig, prepared: dict[str, Any], result: dict[str, Any]) -> Card:
    from model_hooks import Card

    how = f"LoRA of rank {config.rank}" if config.method == "lora" else "all weights trained"
    if config.distill:
        how += f", distilled from {config.undropped}"
    dropped = f"{prepared['dropped']} dropped, then " if prepared["dropped"] else ""
    measured = {
        "held-out loss before training (nats a token)": result["loss_before"],
        "held-out loss after training (nats a token)": result["loss_after"],
        "tokens trained on": result["tokens"],
        "steps": result["steps"],
    }
    return Card(
        config.model,
        f"llm-drop: {dropped}healed on {config.data} ({how})",
        "arXiv 2406.15786",
        measured,
        config.settings(),
    )


train_command = command_of(
    TrainConfig, train, "Heal a dropped model by a short training: LoRA or all weights, on one device or many."
)


def main(argv: list[str] | None = None) -> None:
    """`python -m llm_drop.train`, for launchers; the same as the verb `train` of `llm-drop`."""
    run_module("llm_drop.train", train_command, sys.argv[1:] if argv is None else argv, "Heal a dropped model.")


if __name__ == "__main__":
    main()
