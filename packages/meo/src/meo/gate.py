"""Gates: which experts a group of tokens uses, with what weights (section 3.1 of the paper; Shazeer et al. 2017)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed

from .config import MeoConfig


@dataclass(frozen=True)
class Decision:
    """Experts of each group and their weights.

    Attributes:
        idx: [G, k], int64, no expert twice.
        g: their weights, [G, k], float32 at least, non-negative, summing to 1.
        logits: [G, n], with what noise was added.
        load: how likely each expert is among the selected, or whether it is, [G, n].
        chosen: whether it is, 0 or 1, [G, n].
        stamp: of what it was made from, where that is kept.
    """

    idx: Tensor
    g: Tensor
    logits: Tensor
    load: Tensor
    chosen: Tensor
    stamp: Any = None


def decide(
    clean: Tensor, spread: Tensor | None, config: MeoConfig, training: bool, bias: Tensor | None = None
) -> Decision:
    """Select experts by their logits.

    Args:
        clean: logits without noise, [G, n].
        spread: with gate noisy-topk: standard deviation of the noise, [G, n]; used in training alone.
        bias: [n], added for the selection alone: weights are those of the logits.
    """
    clean = wide(clean) / config.temperature
    logits, noisy = clean, training and spread is not None
    if noisy:
        assert spread is not None
        logits = clean + torch.randn_like(clean) * spread
    elif training and config.gate == "gumbel-st":
        logits = clean - torch.empty_like(clean).exponential_().log()
    n = clean.shape[-1]
    k = n if config.gate == "softmax" else config.k
    idx = top(logits if bias is None else logits + bias, k)
    kept = logits.gather(-1, idx)
    if config.gate == "sigmoid":
        g = F.logsigmoid(kept).softmax(-1)  # sigmoid / sum of sigmoids, without underflow
    elif config.gate == "gumbel-st":
        soft = logits.softmax(-1).gather(-1, idx)
        g = 1 / k + (soft - soft.detach())
    elif config.gate == "hash":
        g = torch.full_like(kept, 1 / k)
    else:
        g = kept.softmax(-1)
    chosen = load = torch.zeros_like(clean).scatter(-1, idx, 1.0)
    if noisy and k < n:
        assert spread is not None
        shift = 0.0 if bias is None else bias
        load = _chance(clean + shift, logits + shift, spread, k)
    if config.straight_through and k < n:  # all experts take part, those not selected with weight zero
        soft = logits.softmax(-1)
        g = torch.zeros_like(clean).scatter(-1, idx, g) + (soft - soft.detach())
        idx = torch.arange(n, device=idx.device).expand(g.shape)
    return Decision(idx, g, logits, load, chosen)


def wide(x: Tensor) -> Tensor:
    """`x` in float32 at least: gates are never computed in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def top(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest of the last dimension, [..., k]; of equal ones those with the lowest index."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def _chance(clean: Tensor, noisy: Tensor, spread: Tensor, k: int) -> Tensor:
    """P(expert is among the k largest | the others' noise), [G, n]: differentiable (Shazeer et al., appendix A)."""
    values = noisy.sort(dim=-1, descending=True, stable=True).values
    inside, outside = values[..., k - 1 : k], values[..., k : k + 1]  # what to beat, from without and from within
    threshold = torch.where(noisy > outside, outside, inside)
    return 0.5 * (1 + torch.erf((clean - threshold) / spread / math.sqrt(2)))


def balance_loss(decision: Decision, config: MeoConfig) -> Tensor:
    """balance_coef · [CV²(Σ_b G) + CV²(load)] + z_coef · mean(logsumexp²), a float32 scalar.

    Sums go over the groups of all processes. Fewer than two groups cannot be balanced: 0.
    """
    importance = torch.zeros_like(decision.logits).scatter_add(-1, decision.idx, decision.g).sum(0)
    sums = torch.cat([importance, decision.load.sum(0), importance.new_tensor([float(len(decision.g))])])
    importance, load, groups = over_processes(sums).split([len(importance), len(importance), 1])
    penalty = (cv_squared(importance) + cv_squared(load)) * (groups >= 2).squeeze()
    z = decision.logits.logsumexp(-1).square().mean()
    return config.balance_coef * penalty + config.z_coef * z


def cv_squared(x: Tensor) -> Tensor:
    """Squared coefficient of variation of the values of a vector, with the unbiased variance."""
    return x.var() / (x.mean().square() + 1e-10)


def over_processes(sums: Tensor) -> Tensor:
    """The sum over all processes. Its gradient is this process's part times their number, since DDP means gradients."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return sums
    total = sums.detach().clone()
    distributed.all_reduce(total)
    scaled = sums * distributed.get_world_size()
    return scaled + (total - scaled).detach()
