"""Budgets that differ by layer (ours): tokens go where they capture the most attention that is still missed."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from model_hooks.errors import RequestError

from .basis import Basis
from .telemetry import Telemetry

SHARES = (0.03125, 0.0625, 0.125, 0.1875, 0.25, 0.375, 0.5, 0.75, 1.0)


@torch.no_grad()
def captured_curves(
    model: Any, basis: Basis, sequences: Tensor, shares: Sequence[float] = SHARES, **settings: Any
) -> Tensor:
    """Share of the exact attention that each layer captures when it reads each of `shares` of the tokens, [L, F].

    Every query of `sequences` [samples, T] counts; rows are the basis' layers, in which sliding layers have ones.
    """
    from .sessions import runtime_of, session

    curves = torch.ones(len(basis.layers), len(shares), dtype=torch.float64)
    for column, share in enumerate(shares):
        if share == 1.0:
            continue
        plain = {"sink": 0, "recent": 0, "min_k": 0, "min_length": 0} | settings
        with session(model, basis, k=share, prefill="masked", stats=True, stats_every=1, **plain):
            telemetry = runtime_of(model).telemetry = Telemetry(1, timed=False)
            for sequence in sequences:
                model(input_ids=sequence[None].to(model.device), use_cache=False)
            for layer, means in telemetry.means().items():
                curves[basis.row(layer), column] = means["captured"]
    return curves


def layer_budgets(curves: Tensor, mean: float, shares: Sequence[float] = SHARES) -> list[float]:
    """Shares of tokens, one a layer, with mean at most `mean`, that capture the most attention in sum.

    Greedy over the concave hull of each layer's curve, which is optimal up to one step.

    Args:
        curves: [L, F] from `captured_curves`.
        mean: the share of tokens that the layers may read on average. `RequestError` below the least of `shares`.
    """
    if isinstance(mean, bool) or not shares[0] <= mean <= 1:
        raise RequestError(f"mean={mean!r}: a share from {shares[0]} (the least that was measured) to 1 is needed")
    layers = len(curves)
    hulls = [_hull(list(shares), row) for row in curves.double().cummax(-1).values.tolist()]
    chosen, left = [0] * layers, mean * layers - shares[0] * layers
    queue = [(-_gain(hull, 0), layer) for layer, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(queue)
    while queue:
        _, layer = heapq.heappop(queue)
        hull, at = hulls[layer], chosen[layer]
        cost = hull[at + 1][0] - hull[at][0]
        if cost > left + 1e-12:
            continue  # a cheaper step of another layer may still fit
        left, chosen[layer] = left - cost, at + 1
        if at + 2 < len(hull):
            heapq.heappush(queue, (-_gain(hull, at + 1), layer))
    return [hull[at][0] for hull, at in zip(hulls, chosen, strict=True)]


Point = tuple[float, float]


def _hull(shares: list[float], captured: list[float]) -> list[Point]:
    """The points of a curve that lie on its upper concave hull."""
    hull: list[Point] = []
    for point in zip(shares, captured, strict=True):
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: Point, b: Point) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def _gain(hull: list[Point], at: int) -> float:
    return _slope(hull[at], hull[at + 1])
