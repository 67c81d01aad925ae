"""How sure is a selection? Resample the calibration data and select again (bootstrap over groups of samples)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from llm_drop.scoring import KINDS, Scores
from llm_drop.selection import Unit, select


@dataclass(frozen=True)
class Stability:
    """Result of a bootstrap.

    Args:
        frequency: share of the draws in which a unit was selected, for units selected at least once.
        interval: 2.5 % and 97.5 % quantiles of each unit's importance.
        agreement: mean share of the selection on all data that a draw selects too.
    """

    frequency: dict[Unit, float]
    interval: dict[Unit, tuple[float, float]]
    agreement: float


def resample(scores: Scores, weights: torch.Tensor) -> Scores:
    """The scores as if group g of the data had come `weights[g]` times."""
    tokens = float(weights @ torch.tensor(scores.group_tokens, dtype=torch.float64))
    means = {
        kind: {
            i: float(weights @ torch.tensor(sums, dtype=torch.float64)) / tokens
            for i, sums in scores.group_sums[kind].items()
        }
        for kind in KINDS
    }
    return replace(scores, attention=means["attention"], mlp=means["mlp"], block=means["block"])


def bootstrap(scores: Scores, *, draws: int = 200, seed: int = 0, **request: Any) -> Stability:
    """Draw the groups with replacement `draws` times and make the same selection each time.

    Args:
        request: what `llm_drop.select` was asked, except `consecutive` and `objective="norm"`.
    """
    generator = torch.Generator().manual_seed(seed)
    filled = [g for g, n in enumerate(scores.group_tokens) if n > 0]
    chosen = set(select(scores, **request).units)
    counts: dict[Unit, int] = {}
    values: dict[Unit, list[float]] = {unit: [] for unit in scores.importance()}
    shared = 0.0
    for _ in range(draws):
        drawn = torch.randint(len(filled), (len(filled),), generator=generator)
        weights = torch.zeros(len(scores.group_tokens), dtype=torch.float64)
        weights.index_add_(0, torch.tensor(filled)[drawn], torch.ones(len(filled), dtype=torch.float64))
        again = resample(scores, weights)
        units = set(select(again, **request).units)
        shared += len(units & chosen) / len(chosen)
        for unit in units:
            counts[unit] = counts.get(unit, 0) + 1
        for unit, value in again.importance().items():
            values[unit].append(value)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    quantiles = {u: torch.tensor(v, dtype=torch.float64).quantile(ends).tolist() for u, v in values.items()}
    return Stability(
        {unit: count / draws for unit, count in sorted(counts.items())},
        {unit: (low, high) for unit, (low, high) in quantiles.items()},
        shared / draws,
    )
