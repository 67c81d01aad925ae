"""Mean repair: what a skipped unit would have added, on average, is added in its place.

A skipped attention leaves its mean output out of the residual stream, the same for all texts to a good part. That part
costs nothing to keep: one vector [H] for each gated layer, measured on the base in one pass and not trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from model_hooks.structure import anatomy
from model_hooks.watch import ResidualWatcher, watch

from .attaching import routers
from .config import RouterConfig, Unit
from .data import Example, collate


class _Means(ResidualWatcher):
    """Sums of what one kind of unit adds to the residual stream, over real tokens."""

    def __init__(self, unit: Unit, depth: int, width: int) -> None:
        self.unit = unit
        self.sums = {
            "added": torch.zeros(depth, width, dtype=torch.float64),
            "tokens": torch.zeros(depth, 1, dtype=torch.float64),
        }

    def see(self, index: int, unit: str, before: Tensor, after: Tensor, mask: Tensor) -> None:
        if unit == self.unit:
            added = (after.float() - before.float()).cpu().double()  # [B, T, H]
            self.sums["added"][index] += added[mask].sum(0)
            self.sums["tokens"][index] += mask.sum()


def measure_means(model: Any, config: RouterConfig, examples: Sequence[Example]) -> dict[int, Tensor]:
    """layer -> [H] float32, the mean over all tokens of what the unit's module gives; `model` has no routers on."""
    parts = anatomy(model)
    width = model.get_submodule(parts.embeddings).weight.shape[-1]
    watcher = _Means(config.unit, len(parts.blocks), width)
    batch = collate(examples)
    watch(model, batch["input_ids"], watcher, attention_mask=batch["attention_mask"])
    means = watcher.sums["added"] / watcher.sums["tokens"].clamp_min(1)
    found = {}
    for layer in config.resolved(len(parts.blocks)):
        block = parts.blocks[layer]
        sublayer = {"attention": block.attention, "mlp": block.mlp, "block": None}[config.unit]
        found[layer] = (means[layer] / (sublayer.scale if sublayer else 1.0)).float()
    return found


def means_of(model: Any) -> dict[int, Tensor]:
    """layer -> [H] of an attached model; {} without repair."""
    return {layer: router.delta for layer, router in routers(model).items() if router.delta is not None}


@torch.no_grad()
def set_means(model: Any, means: dict[int, Tensor]) -> None:
    for layer, held in means_of(model).items():
        held.copy_(means[layer])
