"""Balance without a loss: biases of the selection, moved after each step (DeepSeek-V3, section 2.1.2)."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from .context import Seen


@torch.no_grad()
def move_biases(*seen: Seen) -> None:
    """Move the biases of all banks by what the calls of one step selected, in all processes together.

    An expert that was selected less than the mean becomes `bias_rate` likelier, one that was selected more as much less
    likely. Call it in every process, after the backward pass: layers that are run again there must choose as before.
    Models without `bias_rate` stay as they are, and so does a bank with one group, which cannot be balanced.

    Args:
        seen: what `gating` yielded for the forward passes of the step, one or, with accumulation, several.
    """
    totals: dict[object, Tensor] = {}
    for one in seen:
        for bank, counts in one.chosen.items():
            totals[bank] = totals[bank] + counts if bank in totals else counts
    if not totals:
        return
    counts = torch.stack([c.float() for c in totals.values()])  # [banks, n]
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.all_reduce(counts)
    for bank, row in zip(totals, counts):
        if float(row.sum()) > bank.config.k:  # type: ignore[attr-defined]
            bank.moves += moves(row)  # type: ignore[attr-defined]


def moves(counts: Tensor) -> Tensor:
    """Where biases go, [n] of -1, 0 and 1, for how often each expert was selected, [n]."""
    return torch.sign(counts.mean() - counts).to(torch.int64)
