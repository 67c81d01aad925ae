"""What has to stand before a healing run can begin: the dropped model, its data, the layers that LoRA adapts.

The first process makes them, with the whole model in its memory; all processes then load from the work folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_hooks import RequestError
from paper_tables.training import refuse_longer_than_context, split

if TYPE_CHECKING:
    from torch import Tensor

    from llm_drop.train import TrainConfig
    from model_hooks import Anatomy

DATA = "data.safetensors"
START = "start"  # the model to start from, where it was dropped here
TRAINED = "trained"


def lora_targets(parts: Anatomy) -> tuple[list[str], list[str]]:
    """Names of the linear layers of all attentions and feed-forwards, and of fused expert weights.

    A router is left alone: which expert takes a token is not what a dropped attention spoils.
    Raises `RequestError` where there are none.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    modules: list[str] = []
    banks: list[str] = []
    for block in parts.blocks:
        router = f"{block.name}.{block.mlp.name}.{block.experts.router}" if block.mlp and block.experts else None
        for sublayer in block.sublayers:
            prefix = f"{block.name}.{sublayer.name}"
            for name, module in sublayer.module.named_modules(prefix=prefix):
                if router and (name == router or name.startswith(f"{router}.")):
                    continue
                if isinstance(module, (nn.Linear, Conv1D)):
                    modules.append(name)
                banks += [f"{name}.{key}" for key, p in module.named_parameters(recurse=False) if p.dim() == 3]
    if not modules:
        raise RequestError(
            f"{type(parts.model).__name__} has no linear layers in its attentions and feed-forwards, so LoRA has "
            "nothing to adapt; use --method full"
        )
    return modules, banks


def make_start(config: TrainConfig, part: Path) -> dict[str, Any]:
    """Write the model to start from (if it is dropped here) and the data to `part`; returns what the run must know."""
    from safetensors.torch import save_file

    from llm_drop.plan import Plan
    from llm_drop.repair import apply
    from model_hooks import Card, anatomy, load, save
    from model_hooks.loading import resolve

    plan = Plan.load(config.plan) if config.plan else None
    model, tokenizer = load(config.model)
    _refuse_other_vocabulary(config, model)
    save_file(_sequences(config, model, tokenizer), part / DATA)
    if plan:
        apply(model, plan)
        save(model, part / START, tokenizer, card=Card(config.model, plan.describe()), verify=False)
    parts = anatomy(model)
    modules, banks = lora_targets(parts) if config.method == "lora" else ([], [])
    lost = [f"{kind} of blocks {list(ids)}" for kind, ids in
            (("attention", parts.dropped_attention), ("MLP", parts.dropped_mlp)) if ids]  # fmt: skip
    return {
        "start": "" if plan else resolve(config.model),
        "parent": resolve(config.undropped) if config.undropped else "",
        "dropped": " and ".join(lost),
        "dtype": str(model.dtype).removeprefix("torch."),
        "modules": modules,
        "banks": banks,
    }


def _refuse_other_vocabulary(config: TrainConfig, model: Any) -> None:
    from transformers import AutoConfig

    from model_hooks.loading import resolve

    if not config.undropped:
        return
    try:
        parent = AutoConfig.from_pretrained(resolve(config.undropped)).get_text_config(decoder=True).vocab_size
    except (OSError, ValueError) as error:
        raise RequestError(f"cannot load the parent {config.undropped}: {str(error).splitlines()[0]}") from None
    mine = model.config.get_text_config(decoder=True).vocab_size
    if parent != mine:
        raise RequestError(
            f"the parent {config.undropped} has {parent} tokens, the model {mine}: they cannot be compared"
        )


def _sequences(config: TrainConfig, model: Any, tokenizer: Any) -> dict[str, Tensor]:
    """Token ids "train" [n, length] and "heldout" [m, length]."""
    from model_hooks.text import load_sequences

    refuse_longer_than_context(config, model)
    if config.heldout:
        heldout = load_sequences(tokenizer, config.heldout, samples=config.heldout_samples, length=config.length)
        return {
            "train": load_sequences(tokenizer, config.data, samples=config.samples, length=config.length),
            "heldout": heldout,
        }
    wanted = config.samples + config.heldout_samples
    ids = load_sequences(tokenizer, config.data, samples=wanted, length=config.length)
    train, heldout = split(config, ids, "sequences")
    return {"train": train.clone(), "heldout": heldout.clone()}
