"""Take experts out of a model, in place: the rows of the router go with them, so tokens choose among those that stay.

Where every layer keeps equally many, the result is a stock model. Otherwise the config's `lean` section says how many
experts each block has, and the checkpoint loads after `import model_hooks`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .errors import RequestError
from .experts import MoeLayer, layer_of, moe_layers
from .lean import VERSION, become_lean, become_stock, needs_lean
from .moe import mixture_of_experts
from .structure import Anatomy, anatomy, text_config

COUNT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")  # in configs; aliases of each other


def drop_experts(model: Any, keep: Mapping[int, Sequence[int]], parts: Anatomy | None = None) -> Any:
    """Keep, in each block of `keep`, only the experts named, in place; returns the model.

    Args:
        keep: block (its present number in the stack) -> experts that stay; other blocks keep all of theirs.
        parts: the model's anatomy, where it is known already.

    Raises `RequestError`, before anything changes, for experts that do not exist, none left, or fewer in a group than
    the router's rules need.
    """
    parts = parts or anatomy(model)
    layers = {layer.block: layer for layer in moe_layers(parts)}
    for block, experts in keep.items():
        if block not in layers:
            raise RequestError(f"block {block} has no experts; those with experts are {sorted(layers)}")
        check_keep(layers[block], experts)
    top_k = max(layer.top_k for layer in layers.values())
    for block, experts in keep.items():
        keep_experts(layers[block], experts)
    _describe(model, parts, {block: layer.num_experts for block, layer in layers.items()}, top_k)
    return model


def check_keep(layer: MoeLayer, keep: Sequence[int]) -> None:
    """Raise `RequestError` where the router could not choose among `keep` as it does now."""
    wrong = [e for e in keep if not 0 <= e < layer.num_experts]
    if wrong or len(set(keep)) != len(keep) or not keep:
        raise RequestError(
            f"block {layer.block} cannot keep experts {list(keep)}: some of 0..{layer.num_experts - 1}, each once"
        )
    groups, size = layer.num_groups, layer.num_experts // layer.num_groups
    members = [sum(e // size == group for e in keep) for group in range(groups)]
    if groups > 1 and len(set(members)) > 1:
        raise RequestError(
            f"block {layer.block} would keep {members} experts in its {groups} groups; each group must keep as many, "
            "since the router chooses among groups first"
        )
    if groups > 1 and (members[0] < 2 or members[0] * layer.topk_group < layer.top_k):
        least = groups * max(2, -(-layer.top_k // layer.topk_group))
        raise RequestError(
            f"block {layer.block} would keep {len(keep)} experts; its router of {groups} groups and top-{layer.top_k} "
            f"needs at least {least}"
        )


def keep_experts(layer: MoeLayer, keep: Sequence[int]) -> None:
    """Slice one layer: weights of the bank, and all that the router has for each expert (rows, biases)."""
    before, index = layer.num_experts, torch.tensor(sorted(keep))
    for owner in (layer.bank, layer.router):
        _slice(owner, before, index)
    if hasattr(layer.module, "top_k"):
        layer.module.top_k = layer.router.top_k


def sliced_router(layer: MoeLayer, keep: Sequence[int]) -> Any:
    """A router that chooses among the experts `keep` alone, numbered anew; the layer's own is left as it is."""
    router = copy.deepcopy(layer.router)
    _slice(router, layer.num_experts, torch.tensor(sorted(keep)))
    return router


def _slice(owner: Any, before: int, index: Tensor) -> None:
    for name, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
        if tensor is not None and tensor.shape[:1] == (before,):
            _replace(owner, name, tensor, index)
    if getattr(owner, "num_experts", None) == before:
        owner.num_experts = len(index)
    if hasattr(owner, "top_k"):
        owner.top_k = min(owner.top_k, len(index))


def _replace(owner: Any, name: str, tensor: Tensor, index: Tensor) -> None:
    sliced = tensor.detach()[index.to(tensor.device)] if tensor.device.type != "meta" else tensor[: len(index)]
    if name in owner._parameters:
        owner._parameters[name] = nn.Parameter(sliced, requires_grad=tensor.requires_grad)
    else:
        owner._buffers[name] = sliced


def resize(stack: nn.ModuleList, counts: Sequence[int | None]) -> None:
    """Give the blocks of a freshly built stock model as many experts as `counts` says; None: as it is."""
    for block, count in zip(stack, counts, strict=True):
        if count is None:
            continue
        feed_forward = next(child for child in block.children() if mixture_of_experts(child))
        layer = layer_of(feed_forward)
        assert layer is not None
        keep_experts(layer, range(count))


def _describe(model: Any, parts: Anatomy, counts: dict[int, int], top_k: int) -> None:
    """Write the numbers of experts into the config: the stock key where they are equal, the lean section where not."""
    config = text_config(model)
    lean = dict(getattr(model.config, "lean", None) or {})
    lean.pop("experts", None)
    if len(set(counts.values())) == 1:
        count = next(iter(counts.values()))
        key = next(key for key in COUNT_KEYS if key in config.to_dict())
        setattr(config, key, count)
        config.num_experts_per_tok = min(top_k, count)
        for name, value in (("num_experts", count), ("num_experts_per_tok", config.num_experts_per_tok)):
            if hasattr(model, name):  # which its balance loss reads
                setattr(model, name, value)
    else:
        if getattr(config, "output_router_logits", False):
            config.output_router_logits = False  # its balance loss wants equally many experts in all layers
        stock = int(next(getattr(config, key) for key in COUNT_KEYS if key in config.to_dict()))
        own = [counts.get(block.index) for block in parts.blocks]
        lean = lean or _new_section(parts)
        lean["experts"] = [None if count == stock else count for count in own]
    if lean:
        model.config.lean = lean
        (become_lean if needs_lean(lean) else become_stock)(model)


def _new_section(parts: Anatomy) -> dict[str, Any]:
    """A lean section that says that nothing was dropped yet."""
    return {
        "version": VERSION,
        "base_model_type": parts.model.config.model_type,
        "stack": parts.stack_name,
        "hidden_size": parts.model.get_submodule(parts.embeddings).weight.shape[-1],
        "num_original_layers": len(parts.blocks),
        "original_index": list(range(len(parts.blocks))),
        "dropped_attention": [],
        "dropped_mlp": [],
        "edits": [],
    }
