"""What has to stand before a healing run can begin: the dropped model, its data, the layers that LoRA adapts.

The first process makes them, with the whole model in its memory; all processes then load from the work folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_hooks import RequestError
from model_hooks.lora import lora_targets
from paper_tables.training import token_sequences

if TYPE_CHECKING:
    from llm_drop.train import TrainConfig

DATA = "data.safetensors"
START = "start"  # the model to start from, where it was dropped here
TRAINED = "trained"


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
    save_file(token_sequences(config, model, tokenizer), part / DATA)
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
