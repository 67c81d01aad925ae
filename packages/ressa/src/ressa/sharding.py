"""Repair under ZeRO-3, which splits every weight over the processes of a launcher and gathers it where it is used.

Masks and hashes need whole weights, so each process loads the model whole; DeepSpeed splits it when training begins.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_hooks.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor


def is_stage3(deepspeed: str | None) -> bool:
    """Whether a DeepSpeed file asks for ZeRO-3."""
    if not deepspeed:
        return False
    stage = json.loads(Path(deepspeed).read_text()).get("zero_optimization", {}).get("stage")
    return bool(stage == 3)


@contextmanager
def loaded_whole(arguments: Any) -> Iterator[None]:
    """Inside, transformers loads a model whole in every process, whatever the Trainer's `arguments` ask for."""
    plugin = arguments.deepspeed_plugin
    if plugin is None:
        yield
        return
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(plugin.hf_ds_config)


def prepare_for_splitting(model: Any, taught: bool) -> None:
    """Make a PeftModel with masked adapters ready for DeepSpeed to split its weights.

    A masked layer reads its weight and its adapters itself, so they are gathered together, with the layer.

    Raises:
        RequestError: there are masked layers without adapters, whose dense weights the teacher would have to put in.
    """
    from deepspeed.utils import set_z3_leaf_modules

    from ressa.layers import SparseLoraLinear
    from ressa.teacher import dense

    if taught and model.base_model.held:
        raise RequestError(
            f"{len(model.base_model.held)} pruned layers get no adapters, and the teacher cannot be put in their place "
            "under ZeRO-3; give all branches adapters, pass --teacher none, or use zero2"
        )
    if taught:
        with dense(model):  # looks, while the weights are whole, whether the dense ones are there
            pass
    set_z3_leaf_modules(model, [SparseLoraLinear])


@contextmanager
def gathered(weights: Iterable[Tensor]) -> Iterator[None]:
    """Inside, these weights are whole, to be read; every process enters together. Nothing is done to whole weights."""
    split = [weight for weight in weights if hasattr(weight, "ds_id")]
    if not split:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(split):
        yield
