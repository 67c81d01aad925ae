"""Carry out a plan on a model, in place; and repair routers, which have never chosen among the survivors alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from model_hooks import Anatomy, anatomy, drop
from model_hooks.errors import RequestError
from model_hooks.expert_surgery import check_keep, drop_experts
from model_hooks.experts import ExpertCall, MoeLayer, moe_layers, routed_output, watching_experts
from model_hooks.watch import ResidualWatcher, watch
from moe_compress.selection import Plan

Sample = dict[int, tuple[MoeLayer, Tensor, Tensor]]  # block -> layer, inputs [N, d], routed outputs [N, d]


def apply(model: Any, plan: Plan) -> Any:
    """Take out of `model`, in place, what `plan` names: experts, then MoE sublayers and blocks. Returns the model.

    Router rows go with their experts, so tokens choose among those that stay. The KV cache is renumbered with the
    blocks. Raises `RequestError`, before anything changes, where the plan does not fit the model.
    """
    parts = anatomy(model)
    present = dict(zip(parts.original_index, range(len(parts.blocks)), strict=True))
    gone = [block for block in (*plan.keep, *plan.layers, *plan.blocks) if block not in present]
    if gone:
        raise RequestError(f"the plan names block {gone[0]}, which this model has lost; score the model as it is now")
    going = set(plan.layers) | set(plan.blocks)
    keep = {present[block]: experts for block, experts in plan.keep.items() if block not in going}
    dense = [b for b in plan.layers if parts.blocks[present[b]].experts is None]
    if dense:
        raise RequestError(f"block {dense[0]} has no experts, so it has no MoE layer to drop")
    if len(set(plan.blocks)) >= len(parts.blocks):
        raise RequestError(f"cannot drop {len(plan.blocks)} of {len(parts.blocks)} blocks")
    if keep and plan.preserve_gate:
        _zero_experts(parts, keep)
    elif keep:
        drop_experts(model, keep, parts)
    if going:
        drop(model, attention=plan.blocks, mlp=going - set(parts.dropped_mlp))
    return model


@torch.no_grad()
def _zero_experts(parts: Anatomy, keep: Mapping[int, tuple[int, ...]]) -> None:
    """Make zeros of the experts that are not in `keep`: what a token chooses of them adds nothing."""
    layers = {layer.block: layer for layer in moe_layers(parts)}
    for block, experts in keep.items():
        check_keep(layers[block], experts)
    for block, experts in keep.items():
        gone = [e for e in range(layers[block].num_experts) if e not in experts]
        for weight in layers[block].bank.parameters():
            weight[gone] = 0


def is_stock(model: Any) -> bool:
    """Whether stock transformers, and engines that read its configs, can express the model."""
    from model_hooks.lean import needs_lean

    return not needs_lean(getattr(model.config, "lean", None))


class _Samples(ResidualWatcher):
    """The first `limit` inputs and routed outputs of every mixture."""

    def __init__(self, limit: int) -> None:
        self.sums, self.limit = {}, limit
        self.found: Sample = {}

    def see(self, *_: Any) -> None:
        pass

    def see_experts(self, layer: MoeLayer, call: ExpertCall) -> None:
        _, x, y = self.found.get(layer.block, (layer, call.hidden_states[:0], call.output[:0]))
        room = self.limit - len(x)
        if room > 0:
            more = (call.hidden_states[:room].clone(), call.output[:room].clone())
            self.found[layer.block] = (layer, torch.cat([x, more[0]]), torch.cat([y, more[1]]))


def sample_outputs(model: Any, sequences: Tensor, tokens: int, batch_size: int = 4) -> Sample:
    """The first `tokens` inputs of every mixture and what its routed experts make of them: taken before a drop, these
    are what `repair_routers` aims at after it."""
    watcher = _Samples(tokens)
    with watching_experts(model, moe_layers(anatomy(model)), watcher):
        watch(model, sequences, watcher, batch_size=batch_size)
    return watcher.found


def repair_routers(sample: Sample, *, steps: int = 100, rate: float = 0.02) -> dict[int, dict[str, float]]:
    """Train the router rows of each layer, alone, until the survivors give what all experts gave, in place.

    Adam on the squared error over the first three quarters of the sample; the rest decides whether the new rows are
    taken. Returns the relative error on it, by block, `before` and `after` (equal where the old rows stayed).
    """
    return {block: _repair(layer, x, y, steps, rate) for block, (layer, x, y) in sample.items()}


def _repair(layer: MoeLayer, x: Tensor, y: Tensor, steps: int, rate: float) -> dict[str, float]:
    weight, cut = layer.router.weight, len(x) * 3 // 4
    old, trained = weight.detach().clone(), weight.requires_grad

    def error(part: slice) -> Tensor:
        difference = routed_output(layer, x[part]).float() - y[part].float()
        return difference.square().sum() / y[part].float().square().sum().clamp_min(1e-12)

    with torch.no_grad():
        before = float(error(slice(cut, None)))
    master = old.float().clone().requires_grad_()  # in bfloat16 a step would be lost in rounding
    optimizer = torch.optim.Adam([master], lr=rate * float(old.float().std()))
    weight.requires_grad_()
    with torch.enable_grad():
        for _ in range(steps):
            weight.data.copy_(master.data)
            (master.grad,) = (g.float() for g in torch.autograd.grad(error(slice(cut)), [weight]))
            optimizer.step()
    weight.requires_grad_(trained)
    weight.data.copy_(master.data)
    with torch.no_grad():
        after = float(error(slice(cut, None)))
    if not after < before:
        weight.data.copy_(old)
    return {"before": before, "after": min(after, before)}


def expert_counts(model: Any) -> Mapping[int, int]:
    """Experts of each mixture, by present block number."""
    return {layer.block: layer.num_experts for layer in moe_layers(anatomy(model))}
