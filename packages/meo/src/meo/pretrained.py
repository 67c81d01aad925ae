"""MEO on pretrained mixtures of experts: tokens share one merged expert, in layers where that is close enough.

`Σ g_i gate_up_proj[i]` and `Σ g_i down_proj[i]`, with the mean of the native router's weights over a task's text or
over a sequence. Experts hold an activation, so this is an approximation (exact where it is linear). Every layer's error
is measured on real text first, and a layer above the threshold stays as it is.
"""

from __future__ import annotations

import copy
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from model_hooks.errors import RequestError
from paper_tables.errors import nearest

from .merging import mix

NAME = "meo"  # in transformers' table of experts implementations
POOLS = ("task", "sequence")
Given = tuple[Tensor, Tensor, Tensor]  # hidden_states [tokens, D], top_k_index [tokens, k], top_k_weights [tokens, k]
_CALL: ContextVar[tuple[int, Tensor | None]] = ContextVar("meo_call", default=(1, None))  # rows, mask [rows, T]


@torch.no_grad()
def merge_pretrained(
    model: Any, ids: Tensor, *, threshold: float = 0.1, pool: str = "task", allow_future_leak: bool = False
) -> list[dict[str, Any]]:
    """Run the experts of `model` merged in every layer whose relative error on `ids` is at most `threshold`.

    Args:
        model: a transformers model with fused experts (Mixtral, Qwen2/3-MoE, OLMoE, DeepSeek and alike). Its shared
            experts and routers stay as they are.
        ids: tokens of the task, [rows, T].
        pool: what shares an expert: task (the mean over `ids`, merged once for good), or sequence.
        allow_future_leak: take pool sequence although a decoder's earlier tokens then see later ones.

    Returns:
        A row for each layer: layer, error ‖merged − true‖ / ‖true‖ of the experts' output, merged (whether it is now).

    Raises:
        RequestError: no fused experts, an unknown pool, one that sees future tokens.
    """
    if pool not in POOLS:
        raise RequestError(f"unknown pool {pool!r}{nearest(pool, POOLS)}")
    if pool == "sequence" and not allow_future_leak:
        raise RequestError("pool sequence looks at future tokens; use pool task, or allow the leak for a comparison")
    layers = fused_experts(model)
    seen = _record(model, layers, ids)
    rows = []
    for name, module in layers.items():
        given, true = seen[name]
        gates = mean_gates(module, given, 1) if pool == "task" else None
        ours = merged_forward(module, given, gates if gates is not None else mean_gates(module, given, len(ids)))
        error = float((ours - true).double().norm() / true.double().norm().clamp_min(1e-30))
        rows.append({"layer": name, "error": error, "merged": error <= threshold})
        if error <= threshold:
            _install(module, gates)
    if pool == "sequence":
        model.register_forward_pre_hook(_note_call, with_kwargs=True)
    return rows


def fused_experts(model: Any) -> dict[str, Any]:
    """Modules with fused expert weights, by name. Raises `RequestError` for none, or for a layout that is not known."""
    found = {
        name: module for name, module in model.named_modules()
        if isinstance(getattr(module, "down_proj", None), nn.Parameter) and module.down_proj.dim() == 3
    }  # fmt: skip
    if not found:
        raise RequestError("this model has no fused experts; `meo convert` without --pretrained is for dense models")
    for name, module in found.items():
        if not hasattr(module, "gate_up_proj") or not hasattr(module, "_apply_gate"):
            raise RequestError(
                f"{name} is a {type(module).__name__}; experts with gate_up_proj and down_proj are merged"
            )
    return found


def mean_gates(module: Any, given: Given, groups: int, mask: Tensor | None = None) -> Tensor:
    """Mean weight of every expert over the tokens of each of `groups` equal parts, [groups, n]; `mask`: real tokens."""
    hidden_states, index, weights = given
    n = module.num_experts
    each = torch.zeros(len(hidden_states), n, device=hidden_states.device)
    each = each.scatter_add(1, index.clamp(0, n - 1), weights.float()).view(groups, -1, n)
    if mask is None:
        return each.mean(1)
    real = mask.view(groups, -1, 1).to(each)
    return (each * real).sum(1) / real.sum(1).clamp_min(1)


def merged_forward(module: Any, given: Given, gates: Tensor) -> Tensor:
    """The experts' output [tokens, D] with one merged expert for each of len(gates) equal parts of the tokens."""
    x = given[0].view(len(gates), -1, given[0].shape[-1])
    size = gates.sum(1, keepdim=True)  # 1, unless the router scales its weights
    mean = gates / size.clamp_min(1e-12)
    idx = torch.arange(module.num_experts, device=gates.device).expand(mean.shape)
    up, down = (w.mT if module.is_transposed else w for w in (module.gate_up_proj, module.down_proj))
    shifts = (module.gate_up_proj_bias, module.down_proj_bias) if module.has_bias else (None, None)
    hidden = module._apply_gate(mix(x, up, shifts[0], idx, mean))
    out = mix(hidden, down, shifts[1], idx, mean) * size[:, None].to(x.dtype)
    return out.reshape(given[0].shape)


def _record(model: Any, layers: dict[str, Any], ids: Tensor) -> dict[str, tuple[Given, Tensor]]:
    """What each layer's experts were given, and what they gave, in one forward pass."""
    seen: dict[str, tuple[Given, Tensor]] = {}

    def hook(name: str) -> Any:
        def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            named = [kwargs[k] for k in ("hidden_states", "top_k_index", "top_k_weights") if k in kwargs]
            seen[name] = ((*args, *named)[:3], output)

        return keep

    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in layers.items()]
    try:
        model(input_ids=ids.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _install(module: Any, gates: Tensor | None) -> None:
    """Run this module's experts by `_experts` from now on; `gates` [1, n] for all tokens, None: of each sequence."""
    module.meo_gates = gates
    module.config = copy.copy(module.config)  # of this layer alone
    module.config._experts_implementation = NAME


def _experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """An entry of transformers' table of experts implementations."""
    given = (hidden_states, top_k_index, top_k_weights)
    if module.meo_gates is not None:
        return merged_forward(module, given, module.meo_gates.to(hidden_states.device))
    rows, mask = _CALL.get()
    return merged_forward(module, given, mean_gates(module, given, rows, mask))


def _note_call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    ids: Tensor = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs_embeds"))  # type: ignore[assignment]
    mask = kwargs.get("attention_mask")
    tokens = ids.shape[1]
    _CALL.set((ids.shape[0], None if mask is None or mask.dim() != 2 else mask[:, -tokens:]))


ALL_EXPERTS_FUNCTIONS.register(NAME, _experts)
