"""Muon (Jordan et al. 2024): momentum whose matrix updates are orthogonalised by a Newton-Schulz iteration.

``torch.optim.Muon`` is the same method a matrix at a time in bfloat16; on a CPU, where bfloat16 is slow and a tiny
model has a hundred small matrices, stacking equal shapes and staying in float32 is several times faster.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of every matrix of [n, rows, columns] towards 1."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """For weights of hidden layers: matrices, or stacks of them [n, rows, columns]; ``weight_decay`` is decoupled."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(list(params), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[tuple(p.shape)].append(p)
            for same in shapes.values():
                self._update(same, group)

    def _update(self, same: list[Tensor], group: dict[str, Any]) -> None:
        directions = []
        for p in same:
            assert p.grad is not None
            state = self.state[p]
            buffer = state.setdefault("momentum", torch.zeros_like(p))
            buffer.lerp_(p.grad, 1 - group["momentum"])
            directions.append(p.grad.lerp(buffer, group["momentum"]))  # Nesterov
        rows, columns = same[0].shape[-2:]
        updates = orthogonalise(torch.stack(directions).view(-1, rows, columns)) * max(1.0, rows / columns) ** 0.5
        updates = updates.view(len(same), *same[0].shape)
        for p, update in zip(same, updates, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])
