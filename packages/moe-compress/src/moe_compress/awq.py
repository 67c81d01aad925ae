"""AWQ on a mixture of experts (arXiv 2306.00978), with a router that goes on routing as before.

Input channels of the experts that matter are scaled up before rounding, and what feeds them is scaled down: one scale s
[d] for gate and up of all experts is folded into the norm before the mixture, and one [f] for each expert's down_proj
into its up_proj. The norm feeds the router, too (and a shared expert and its gate), so their columns are multiplied by
s as well: without that, tokens would change their experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from model_hooks.errors import UnsupportedArchitectureError
from model_hooks.experts import MoeLayer
from model_hooks.structure import Block
from moe_compress.moments import expert_inputs
from moe_compress.quantising import Codes, rtn

RATIOS = tuple(step / 20 for step in range(20))
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}  # of the mixture's output for the median token; others: 5 %


@torch.no_grad()
def smooth(block: Block, layer: MoeLayer, sample: Tensor, how: Codes) -> dict[str, float]:
    """Fold the best scales into the weights of one block, in place; nothing is rounded yet.

    Args:
        sample: inputs of the mixture, [N, d].

    Returns: `ratio` of the shared scale, and the `error` of rounding without and with all scales, relative to it.

    Raises `UnsupportedArchitectureError` where the mixture's output moves, since then something else reads the norm.
    """
    norm = _norm_before(block, layer)
    before = layer.module(sample[None])[0].float()
    routed = _routed_tokens(layer, sample)
    importance = sample.float().abs().mean(0)  # [d]
    weights = [layer.bank.gate_up_proj.data[e] for e in range(layer.num_experts)]

    def error(s: Tensor) -> float:
        total = 0.0
        for expert, x in routed.items():
            trial = rtn(weights[expert] * s, how).weight / s
            total += float(((trial - weights[expert]).float() @ x.float().T).square().sum())
        return total

    size = torch.stack([_relative_size(w, how.group) for w in weights]).mean(0)
    s, ratio, gain = _best(importance, size, error)
    _fold(norm, layer, s.to(sample.dtype))
    scaled = (sample.float() / s).to(sample.dtype)
    down = [_smooth_down(layer, e, scaled[_rows(layer, scaled, e)], how) for e in range(layer.num_experts)]
    change = (layer.module(scaled[None])[0].float() - before).norm(dim=-1) / before.norm(dim=-1).clamp_min(1e-12)
    moved = float(change.median())  # rounding of bfloat16 sends a few tokens to another expert
    if moved > TOLERANCE.get(sample.dtype, 0.05):
        raise UnsupportedArchitectureError(
            f"scales cannot be folded into {block.name}: its output moves by {moved:.1e}, so more reads its norm than "
            "router and experts; use --method gptq"
        )
    return {"ratio": ratio, "gain": gain, "down_gain": sum(down) / len(down)}


def _best(importance: Tensor, size: Tensor, error: Callable[[Tensor], float]) -> tuple[Tensor, float, float]:
    """The scale x^r / w^(1-r), normalised by sqrt(max * min), with the least error; its r; and error over that of 1."""
    plain = error(torch.ones_like(importance))
    best, found, least = torch.ones_like(importance), 0.0, plain
    for ratio in RATIOS:
        s = (importance.clamp_min(1e-6).pow(ratio) / size.clamp_min(1e-6).pow(1 - ratio)).clamp_min(1e-4)
        s = s / (s.max() * s.min()).sqrt()
        wrong = error(s)
        if wrong < least:
            best, found, least = s, ratio, wrong
    return best, found, least / plain if plain else 1.0


def _smooth_down(layer: MoeLayer, expert: int, x: Tensor, how: Codes) -> float:
    """Fold the scale of one expert's down_proj into its up_proj; how much error is left, as a share."""
    hidden = expert_inputs(layer, expert, x)["hidden"]
    weight, half = layer.bank.down_proj.data[expert], layer.bank.gate_up_proj.shape[1] // 2
    if not len(hidden):
        return 1.0

    def error(s: Tensor) -> float:
        trial = rtn(weight * s, how).weight / s
        return float(((trial - weight).float() @ hidden.float().T).square().sum())

    s, _, gain = _best(hidden.float().abs().mean(0), _relative_size(weight, how.group), error)
    weight.mul_(s)
    layer.bank.gate_up_proj.data[expert, half:].div_(s[:, None])
    return gain


def _fold(norm: Any, layer: MoeLayer, s: Tensor) -> None:
    norm.weight.div_(s)
    layer.bank.gate_up_proj.mul_(s)
    bank = {id(p) for p in layer.bank.parameters()}
    shared_inner = {id(p) for name in layer.shared for p in _inner(getattr(layer.module, name))}
    for parameter in layer.module.parameters():
        reads = parameter.dim() == 2 and parameter.shape[1] == len(s)
        if reads and id(parameter) not in bank | shared_inner:
            parameter.mul_(s)


def _inner(expert: nn.Module) -> list[Tensor]:
    """The down projection of a shared expert: it reads hidden states of its own."""
    return [p for name, p in expert.named_parameters() if "down" in name or "w2" in name]


def _norm_before(block: Block, layer: MoeLayer) -> Any:
    assert block.mlp is not None
    names = block.mlp.pre
    norm = block.module.get_submodule(names[-1]) if names else None
    weight = getattr(norm, "weight", None)
    if weight is None or weight.dim() != 1 or block.layout == "parallel" or names[-1] in block.mlp.shared:
        raise UnsupportedArchitectureError(f"{layer.name} has no norm of its own before it; use --method gptq")
    return norm


def _routed_tokens(layer: MoeLayer, sample: Tensor) -> dict[int, Tensor]:
    return {e: sample[rows] for e in range(layer.num_experts) if len(rows := _rows(layer, sample, e))}


def _rows(layer: MoeLayer, sample: Tensor, expert: int) -> Tensor:
    """Tokens of `sample` that the router sends to an expert."""
    return (layer.router(sample)[2] == expert).any(-1).nonzero().flatten()


def _relative_size(weight: Tensor, group: int) -> Tensor:
    """Mean over rows of each weight's size beside the largest of its group, [d_in]."""
    groups = weight.float().abs().view(weight.shape[0], -1, group)
    return (groups / groups.amax(-1, keepdim=True).clamp_min(1e-12)).view_as(weight).mean(0)
