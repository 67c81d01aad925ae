"""LoRA on every linear layer of attention and feed-forward, and on the fused weights of experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .errors import RequestError

if TYPE_CHECKING:
    from .structure import Anatomy


def lora_targets(parts: Anatomy) -> tuple[list[str], list[str]]:
    """Names of the linear layers of all attentions and feed-forwards, and of fused expert weights.

    A router is left alone: which expert takes a token is not what a dropped sublayer spoils.
    Raises `RequestError` where there are none.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    modules: list[str] = []
    banks: list[str] = []
    for block in parts.blocks:
        router = f"{block.name}.{block.mlp.name}.{block.experts.router}" if block.mlp and block.experts else None
        for sublayer in block.sublayers:
            for part in (*sublayer.pre, sublayer.name):  # OPT's block holds the first matrix of a feed-forward itself
                for name, module in block.module.get_submodule(part).named_modules(prefix=f"{block.name}.{part}"):
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


def add_lora(
    model: Any, modules: Sequence[str], banks: Sequence[str], *, rank: int, alpha: int, seed: int
) -> Any:  # fmt: skip
    """`model` with adapters of `rank` and scale alpha / rank on what `lora_targets` names; the rest is frozen. Every
    process of a launcher begins with the same ones. Needs peft."""
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    set_seed(seed)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, task_type="CAUSAL_LM", target_modules=list(modules),
        target_parameters=list(banks) or None,
    )  # fmt: skip
    return get_peft_model(model, config)
