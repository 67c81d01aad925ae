"""Superfiltering.D's diversity step: choose records such that every record has a similar one among the chosen.

    F(S) = sum over records i of max(0, max_{j in S} s_ij)          (facility location; submodlib's, metric euclidean)

F is monotone and submodular, so the greedy choice of k records has F >= (1 - 1/e) times the optimum of that size
(Nemhauser, Wolsey and Fisher, 1978). Under quotas by group (a partition matroid) greedy has at least 1/2 of the
optimum; stochastic greedy has 1 - 1/e - epsilon in expectation (Mirzasoleiman et al., 2015).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from model_hooks import RequestError

from .kernels import BLOCK, KERNELS, Dense, Kernel, Sparse, prepare, squared_distances

Optimiser = Literal["lazy", "naive", "stochastic"]
OPTIMISERS = ("lazy", "naive", "stochastic")
FIRST, MOST = 16, 512  # candidates looked at again together: the first time for a choice, and at most


@dataclass(frozen=True)
class Coverage:
    """How well chosen records stand for all n: F, F / n within [0, 1], and the mean distance to the nearest one.

    Distances are Euclidean, between the normalised embeddings for the cosine kernel; None where nothing is chosen.
    """

    objective: float
    coverage: float
    mean_distance: float | None


@dataclass(frozen=True)
class Facility:
    """The choice. Fields:

    chosen: positions in the order of choice; the first is the best single representative.
    gains: what each choice added to F (with `neighbours`, to its approximation), never rising without quotas unless
        the optimiser is stochastic: where the curve flattens, a smaller budget would have done.
    covered: of `given` and `chosen` together, computed exactly.
    evaluations: how many gains were computed.
    """

    chosen: NDArray[np.int64]
    gains: NDArray[np.float64]
    covered: Coverage
    evaluations: int


def facility_location(
    embeddings: Any,
    budget: int | None = None,
    *,
    kernel: str = KERNELS[0],
    gamma: float = 1.0,
    optimiser: Optimiser = "lazy",
    epsilon: float = 0.1,
    seed: int = 0,
    given: Sequence[int] = (),
    groups: Sequence[Hashable] | None = None,
    quotas: Mapping[Hashable, int] | None = None,
    neighbours: int | None = None,
    device: str = "cpu",
    cache_bytes: int = 2**30,
    progress: Callable[[int], Any] | None = None,
) -> Facility:
    """Choose `budget` records greedily; see the module's text for the objective and its guarantee.

    Args:
        embeddings: [n, d], numpy or torch, finite.
        budget: how many; left out with `quotas`, whose sum it is. There is no stop at a gain of zero.
        kernel, gamma: see `superfiltering.kernels`.
        optimiser: "lazy" and "naive" choose the same, "naive" looking at every candidate every time; "stochastic"
            looks at n / budget * ln(1 / epsilon) random candidates (`seed`) for each choice.
        given: positions that count as chosen already; they are not chosen again and not part of the budget.
        groups, quotas: a label for each record, and how many to choose of each label (none of a label not named).
        neighbours: keep only that many similarities a record (`superfiltering.kernels.Sparse` says what that means).
        cache_bytes: similarities are computed once and held if they need at most this (4 n^2 bytes), else each time.
        progress: called with the number of choices made.

    Equal gains: the lower position first. Raises `RequestError` for a budget above what can be chosen, unknown names
    and numbers out of range, each with what is accepted.
    """
    measure = Kernel(kernel, gamma)
    x = prepare(embeddings, measure, device)
    taken = _positions(given, len(x))
    room = _Room(len(x), taken, groups, quotas, budget)
    _check(optimiser, epsilon, neighbours, len(x))
    if not room.budget:
        return Facility(np.empty(0, np.int64), np.empty(0), _coverage(x, taken, measure), 0)
    if neighbours is not None:
        space: Dense | Sparse = Sparse(x, measure, neighbours)
    else:
        space = Dense(x, measure, cache=4 * len(x) ** 2 <= cache_bytes)
    for position in taken:
        space.add(int(position))
    search = _Search(space, room, optimiser, math.log(1 / epsilon), np.random.default_rng(seed))
    chosen, gains = np.empty(room.budget, np.int64), np.empty(room.budget)
    for step in range(room.budget):
        chosen[step], gains[step] = search.next()
        if progress is not None:
            progress(step + 1)
    del space, search.space
    return Facility(chosen, gains, _coverage(x, np.concatenate([taken, chosen]), measure), search.evaluations)


def coverage(
    embeddings: Any, chosen: Sequence[int], *, kernel: str = KERNELS[0], gamma: float = 1.0, device: str = "cpu"
) -> Coverage:
    """How well any choice of positions, however made, covers all records [n, d]; exact, in row blocks."""
    measure = Kernel(kernel, gamma)
    x = prepare(embeddings, measure, device)
    return _coverage(x, _positions(chosen, len(x)), measure)


def _coverage(x: torch.Tensor, chosen: NDArray[np.int64], kernel: Kernel) -> Coverage:
    if not len(chosen):
        return Coverage(0.0, 0.0, None)
    centres = x[torch.from_numpy(chosen).to(x.device)]
    objective = distance = 0.0
    for part in x.split(max(1, BLOCK // len(chosen))):
        squared = squared_distances(part, centres).amin(1)
        distance += float(squared.sqrt().sum())
        objective += len(part) - float(kernel.dissimilarity(squared, x.shape[1]).sum())
    return Coverage(objective, objective / len(x), distance / len(x))


class _Room:
    """Which candidates may still be chosen."""

    def __init__(
        self,
        n: int,
        taken: NDArray[np.int64],
        groups: Sequence[Hashable] | None,
        quotas: Mapping[Hashable, int] | None,
        budget: int | None,
    ) -> None:
        self.open = np.ones(n, bool)
        self.open[taken] = False
        self.codes: NDArray[np.int64] | None = None
        if (groups is None) != (quotas is None) or (quotas is None) == (budget is None):
            raise RequestError("facility location takes a budget, or groups (a label a record) with quotas")
        if groups is not None and quotas is not None:
            self._divide(groups, quotas)
            budget = sum(quotas.values())
        assert budget is not None  # for the type checker: one of the two is there
        free = int(self.open.sum())
        if not 0 <= budget <= free:
            given = f", {len(taken)} of them given" if len(taken) else ""
            raise RequestError(f"budget {budget} of {n} records{given}: 0 to {free} can be chosen")
        self.budget = budget

    def _divide(self, groups: Sequence[Hashable], quotas: Mapping[Hashable, int]) -> None:
        if len(groups) != len(self.open):
            raise RequestError(f"{len(groups)} groups for {len(self.open)} records; one label each is needed")
        code = {label: k for k, label in enumerate(quotas)}
        self.codes = np.array([code.get(label, len(code)) for label in groups], dtype=np.int64)
        self.left = np.array([*quotas.values(), 0], dtype=np.int64)
        free = np.bincount(self.codes[self.open], minlength=len(code) + 1)
        for label, k in code.items():
            if not 0 <= quotas[label] <= free[k]:
                raise RequestError(f"quota {quotas[label]} of group {label!r}: 0 to {free[k]} can be chosen of it")
        self.open &= self.left[self.codes] > 0

    def close(self, chosen: int) -> None:
        self.open[chosen] = False
        if self.codes is not None:
            group = self.codes[chosen]
            self.left[group] -= 1
            if not self.left[group]:
                self.open &= self.codes != group


class _Search:
    """One greedy choice after the other. `bounds` are gains computed for an earlier, smaller S: submodularity makes
    them upper bounds of the present gains, so a candidate whose present gain is above all of them is the best."""

    def __init__(
        self, space: Dense | Sparse, room: _Room, optimiser: Optimiser, log: float, draw: np.random.Generator
    ) -> None:
        self.space, self.room, self.draw = space, room, draw
        self.next = {"lazy": self._lazy, "naive": self._naive, "stochastic": self._stochastic}[optimiser]
        self.sample = math.ceil(len(room.open) / room.budget * log)
        self.bounds = np.full(len(room.open), np.inf)
        self.seen = np.zeros(len(room.open), np.int64)  # the choice for which a bound was computed
        self.step = self.evaluations = 0

    def _gains(self, candidates: NDArray[np.int64]) -> NDArray[np.float64]:
        self.evaluations += len(candidates)
        return self.space.gains(candidates)

    def _take(self, chosen: int, gain: float) -> tuple[int, float]:
        self.space.add(chosen)
        self.room.close(chosen)
        return chosen, gain

    def _naive(self) -> tuple[int, float]:
        candidates = np.flatnonzero(self.room.open)
        gains = self._gains(candidates)
        best = int(gains.argmax())  # the first of equals
        return self._take(int(candidates[best]), float(gains[best]))

    def _stochastic(self) -> tuple[int, float]:
        candidates = np.flatnonzero(self.room.open)
        some = np.sort(self.draw.choice(candidates, min(self.sample, len(candidates)), replace=False))
        gains = self._gains(some)
        best = int(gains.argmax())
        return self._take(int(some[best]), float(gains[best]))

    def _lazy(self) -> tuple[int, float]:
        self.step += 1
        self.bounds[~self.room.open] = -np.inf
        size = FIRST
        while True:
            best = int(self.bounds.argmax())  # the first of equals: as the naive choice
            if self.seen[best] == self.step:
                return self._take(best, float(self.bounds[best]))
            stale = self._most_promising(size)
            self.bounds[stale] = self._gains(stale)
            self.seen[stale] = self.step
            size = min(2 * size, MOST)

    def _most_promising(self, size: int) -> NDArray[np.int64]:
        """Up to `size` open candidates with the highest bounds among those not yet looked at for this choice."""
        candidates = np.flatnonzero(self.room.open & (self.seen < self.step))
        if len(candidates) > size:
            bounds = self.bounds[candidates]
            candidates = np.sort(candidates[np.argpartition(bounds, len(bounds) - size)[-size:]])
        return candidates


def _positions(given: Sequence[int], n: int) -> NDArray[np.int64]:
    positions = np.asarray(given, dtype=np.int64).reshape(-1)
    if len(np.unique(positions)) < len(positions) or ((positions < 0) | (positions >= n)).any():
        raise RequestError(f"chosen positions must differ and lie within 0 and {n - 1}")
    return positions


def _check(optimiser: str, epsilon: float, neighbours: int | None, n: int) -> None:
    if optimiser not in OPTIMISERS:
        raise RequestError(f"unknown optimiser {optimiser!r}; there are {', '.join(OPTIMISERS)}")
    if not 0 < epsilon < 1:
        raise RequestError(f"epsilon {epsilon} of the stochastic optimiser; a number between 0 and 1 is needed")
    if neighbours is not None and not 1 <= neighbours <= n:
        raise RequestError(f"{neighbours} neighbours of {n} records; 1 to {n} are possible")
