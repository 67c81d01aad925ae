"""The router: one bias-free linear map of a layer's input to the probability that the layer runs (section 3, MindSkip).

    z = w . pool(h),   p = sigmoid(z),   g = 1[p >= tau]

with w = 0 at the start, so that p = 0.5 and every gate is open: the untrained model is the base model, on the boundary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DECAY = 0.9  # of the pooling "ema": weight of what came before


class Router(nn.Module):
    """`weight` [1, H] in float32 whatever the model's dtype, since decisions lie near the boundary.

    `rms`: inputs are raw residual streams, whose scale grows with depth; they are divided by their root mean square.
    `delta` [H], with `repair`: what is added where the layer is skipped, the mean of what it would have added.
    """

    delta: Tensor | None

    def __init__(self, hidden_size: int, rms: bool = False, device: Any = None, repair: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size, dtype=torch.float32, device=device))
        self.rms = rms
        zeros = torch.zeros(hidden_size, dtype=torch.float32, device=device) if repair else None
        self.register_buffer("delta", zeros)  # no parameter, so that ZeRO-3 and FSDP do not cut it

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None, pool: str = "prompt_mean") -> Tensor:
        """Logits z in float32: [B] for [B, T, H] with a `mask` [B, T] of the tokens that decide (None: all).

        With pool="token" [B, T], each token its own.
        """
        with torch.autocast(hidden_states.device.type, enabled=False):  # under it a linear map is not in float32
            h = hidden_states.float()
            if self.rms:
                h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)
            if pool != "token":
                h = pooled(h, mask, pool)
            return F.linear(h, self.weight.float()).squeeze(-1)


def pooled(h: Tensor, mask: Tensor | None, pool: str) -> Tensor:
    """[B, H] float32 from h [B, T, H] float32 over the tokens of `mask` [B, T]: their mean, the last, or an EMA."""
    if mask is None:
        mask = h.new_ones(h.shape[:2], dtype=torch.bool)
    weights = mask.to(h.dtype)
    if pool in ("last", "ema"):
        after = weights.flip(1).cumsum(1).flip(1) - weights  # deciding tokens that follow
        weights = weights * ((after == 0).to(h.dtype) if pool == "last" else DECAY**after)
    weights = weights / weights.sum(1, keepdim=True).clamp_min(1e-30)
    # where a row has no weight its states may be anything, padding's NaN included
    return (h.masked_fill(~mask[..., None], 0) * weights[..., None]).sum(1)


def straight_through(p: Tensor, tau: float) -> Tensor:
    """1 where p >= tau, else 0; the gradient passes as if it were p."""
    hard = (p.detach() >= tau).to(p.dtype)
    return hard + (p - p.detach())
