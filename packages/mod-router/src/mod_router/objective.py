"""What routers are trained for.

paper:     L = L_CE + lambda * sum over gated layers of the mean gate          (a price on what is used)
capacity:  L = (1 - d) L_CE + d KL(ungated || routed) + nu * e + rho / 2 * e^2,   e = mean gate - target

with nu += rate * e after each step: an augmented Lagrangian, whose multiplier grows until the target is met and which
pushes in both directions. The KL needs no labels and no second model: the ungated model is the same weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .context import Seen


@dataclass
class Multiplier:
    """The state of the dual ascent. `rho`: stiffness; `rate`: of the multiplier; `mean`: running mean of the use."""

    target: float
    nu: float = 0.0
    rho: float = 1.0
    rate: float = 0.1
    mean: float | None = None

    def penalty(self, used: Tensor) -> Tensor:
        error = used - self.target
        return self.nu * error + 0.5 * self.rho * error.square()

    def step(self, used: float) -> None:
        """After an optimizer step in which `used` was measured."""
        self.mean = used if self.mean is None else 0.8 * self.mean + 0.2 * used
        self.nu += self.rate * (self.mean - self.target)


def paper_penalty(seen: Seen, weight: float) -> Tensor:
    """lambda * sum_l mean_b g; positive in the gates, so it always pushes towards skipping."""
    return weight * torch.stack([seen.used(layer).mean() for layer in sorted(seen.gates)]).sum()


def token_losses(logits: Tensor, labels: Tensor, teacher: Tensor | None, distill: float) -> Tensor:
    """Mean over labelled tokens of each row, [B] float32, of (1 - d) CE + d KL(teacher || student).

    Args:
        logits, teacher: [B, T, vocabulary]; `teacher` may be None with distill=0. labels: [B, T], -100 where none.
    """
    losses = []
    for row in range(len(labels)):  # the float32 copy of all logits at once would be the largest tensor of all
        places = (labels[row, 1:] != -100).nonzero().squeeze(1)
        log_q = logits[row, places].float().log_softmax(-1)  # [n, vocabulary]
        loss = log_q.new_zeros(len(places))
        if distill < 1:
            targets = labels[row, places + 1]
            loss = loss + (1 - distill) * F.nll_loss(log_q, targets, reduction="none")
        if distill and teacher is not None:
            log_p = teacher[row, places].float().log_softmax(-1)
            loss = loss + distill * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        losses.append(loss.sum() / max(1, len(places)))
    return torch.stack(losses)
