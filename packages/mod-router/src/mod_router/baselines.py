"""What routing is compared with: static dropping by similarity, gates by lot, and training all weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from model_hooks.watch import ResidualWatcher, watch

from .attaching import routers
from .config import Unit
from .context import routing_context
from .data import Example, collate
from .gate import runtime_of
from .measuring import device_of
from .objective import Multiplier, token_losses

Decisions = Callable[[int, int], Mapping[int, Tensor]]


class _Similarity(ResidualWatcher):
    """Sums of the cosine of the residual stream before and after one kind of unit."""

    def __init__(self, unit: Unit, depth: int) -> None:
        self.unit = unit
        self.sums = {
            "cosine": torch.zeros(depth, dtype=torch.float64),
            "tokens": torch.zeros(depth, dtype=torch.float64),
        }

    def see(self, index: int, unit: str, before: Tensor, after: Tensor, mask: Tensor) -> None:
        if unit == self.unit:
            cosine = torch.cosine_similarity(before.float(), after.float(), dim=-1).cpu().double()
            self.sums["cosine"][index] += (cosine * mask).sum()
            self.sums["tokens"][index] += mask.sum()


def static(model: Any, ids: Tensor, layers: Sequence[int], unit: Unit, keep: int) -> Decisions:
    """Always the same `keep` of `layers` run: those whose unit changes the residual stream most (as LLM-Drop chooses).

    Args:
        ids: calibration sequences, [N, T]; `model` has no routers on.
    """
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    watcher = _Similarity(unit, depth)
    watch(model, ids, watcher)
    similarity = watcher.sums["cosine"] / watcher.sums["tokens"].clamp_min(1)
    kept = set(sorted(layers, key=lambda layer: float(similarity[layer]))[:keep])
    return lambda first, rows: {layer: torch.full((rows,), layer in kept) for layer in layers}


def by_lot(layers: Sequence[int], share: float, examples: int, seed: int) -> Decisions:
    """Each pair of sequence and layer runs with chance `share`."""
    lot = torch.Generator().manual_seed(seed)
    gates = {layer: torch.rand(examples, generator=lot) < share for layer in layers}
    return lambda first, rows: {layer: gate[first : first + rows] for layer, gate in gates.items()}


def train_everything(
    model: Any, examples: Sequence[Example], *, steps: int, batch_size: int, learning_rate: float, router_rate: float,
    seed: int = 0,
) -> int:  # fmt: skip
    """Train routers and all weights of an attached model together, in place; the number of parameters trained.

    The loss is cross-entropy, since the ungated model moves too, and the capacity target of the configuration.
    """
    own = [router.weight for router in routers(model).values()]
    ids = {id(weight) for weight in own}
    rest = [p for p in model.parameters() if id(p) not in ids]
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        [{"params": own, "lr": router_rate}, {"params": rest, "lr": learning_rate}], weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    dual = Multiplier(runtime_of(model).config.target_capacity)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    for step in range(steps):
        rows = [examples[order[(step * batch_size + i) % len(order)]] for i in range(batch_size)]
        batch = {k: v.to(device_of(model)) for k, v in collate(rows).items()}
        pool, labels = batch.pop("pool_mask"), batch.pop("labels")
        with routing_context(pool_mask=pool, train=True) as seen:
            logits = model(**batch, use_cache=False).logits
            loss = token_losses(logits, labels, None, 0.0).mean() + dual.penalty(seen.capacity)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        dual.step(float(seen.capacity.detach()))
    model.requires_grad_(False)
    runtime_of(model).last = None
    return sum(p.numel() for p in (*own, *rest))
