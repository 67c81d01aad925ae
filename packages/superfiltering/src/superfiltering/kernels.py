"""Similarities between embeddings, and what a candidate would add to the coverage of all records, in row blocks.

Every kernel is a function of the Euclidean distance D between two embeddings of dimension d:

    exp-euclidean/d    s = exp(-D / d)          submodlib's metric "euclidean", the one of Superfiltering.D
    cosine             s = max(0, 1 - D^2 / 2)  of the normalised embeddings
    rbf                s = exp(-gamma D^2)

For unit vectors and d = 384 the first lies within [0.9948, 1], where float32 has only some 40,000 steps. So what is
kept is t = 1 - s, computed in float64 from the distance and then rounded to float32: relative precision 6e-8.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model_hooks import RequestError

KERNELS = ("exp-euclidean/d", "cosine", "rbf")
SAME = 1e-12  # squared distance over squared norms: nearer than the rounding of float32 embeddings is a duplicate
BLOCK = 2**24  # numbers in one block: 128 MB of float64 distances


@dataclass(frozen=True)
class Kernel:
    """A similarity. `gamma` belongs to rbf alone."""

    name: str = KERNELS[0]
    gamma: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in KERNELS:
            raise RequestError(f"unknown kernel {self.name!r}; there are {', '.join(KERNELS)}")
        if not (math.isfinite(self.gamma) and self.gamma > 0):
            raise RequestError(f"gamma {self.gamma} of the rbf kernel; a number above 0 is needed")

    def dissimilarity(self, squared: Tensor, dimension: int) -> Tensor:
        """1 - s, within [0, 1], of squared distances; `squared` (float64, any shape) is overwritten."""
        if self.name == "cosine":
            return squared.div_(2).clamp_(max=1)
        if self.name == "rbf":
            return squared.mul_(-self.gamma).expm1_().neg_()
        return squared.sqrt_().div_(-dimension).expm1_().neg_()


def prepare(embeddings: Any, kernel: Kernel, device: str = "cpu") -> Tensor:
    """Embeddings [n, d] as float64 on `device`, normalised for the cosine kernel. Raises `RequestError` if unusable."""
    x = torch.as_tensor(embeddings)
    if x.ndim != 2 or x.shape[1] < 1:
        raise RequestError(f"embeddings of shape {list(x.shape)}; [records, dimension] is needed")
    x = x.to(device=device, dtype=torch.float64)
    broken = ~torch.isfinite(x).all(1)
    if broken.any():
        raise RequestError(f"the embedding of record {int(broken.int().argmax())} is not finite; embed it again")
    if kernel.name != "cosine":
        return x
    norms = x.norm(dim=1, keepdim=True)
    if (norms == 0).any():
        raise RequestError(f"the embedding of record {int((norms == 0).int().argmax())} is zero: it has no cosine")
    return x / norms


def squared_distances(a: Tensor, b: Tensor, norms: Tensor | None = None) -> Tensor:
    """[len(a), len(b)] squared Euclidean distances; exactly 0 between duplicates. `norms`: squared norms of b."""
    scale = (a * a).sum(1)[:, None] + ((b * b).sum(1) if norms is None else norms)
    squared = torch.addmm(scale, a, b.T, alpha=-2)
    return squared.masked_fill_(squared <= SAME * scale, 0)


class Dense:
    """All similarities; with `cache`, computed once and held as float32 (4 n^2 bytes), else when they are needed.

    The choices are the same either way, up to candidates that differ by less than rounding.
    """

    def __init__(self, x: Tensor, kernel: Kernel, *, cache: bool) -> None:
        self.x, self.kernel = x, kernel
        self.norms = (x * x).sum(1)
        self.block = max(1, min(len(x), BLOCK // max(1, len(x)) // (1 if cache else 2)))
        self.nearest: Tensor | None = None  # min of t_ij over the chosen j; None where nothing is chosen
        self.cached: Tensor | None = None
        if cache:
            self.cached = torch.empty((len(x), len(x)), device=x.device)
            for start in range(0, len(x), self.block):
                rows = torch.arange(start, min(start + self.block, len(x)), device=x.device)
                self.cached[start : start + len(rows)] = self._compute(rows)

    def _compute(self, rows: Tensor) -> Tensor:
        squared = squared_distances(self.x[rows], self.x, self.norms)
        return self.kernel.dissimilarity(squared, self.x.shape[1]).float()

    def _rows(self, rows: Tensor) -> Tensor:
        return self._compute(rows) if self.cached is None else self.cached[rows]

    def gains(self, candidates: NDArray[np.int64]) -> NDArray[np.float64]:
        """F(S + j) - F(S) of every candidate j, float64."""
        found = np.empty(len(candidates))
        for start in range(0, len(candidates), self.block):
            part = torch.from_numpy(candidates[start : start + self.block]).to(self.x.device)
            rows = self._rows(part)
            if self.nearest is None:  # F({j}) itself, summed so that float32 does not see 1 - t
                gains = len(self.x) - rows.sum(1, dtype=torch.float64)
            else:
                gains = (self.nearest - rows).relu_().sum(1, dtype=torch.float64)
            found[start : start + len(part)] = gains.cpu().numpy()
        return found

    def add(self, chosen: int) -> None:
        """Take record `chosen` into S."""
        row = self._rows(torch.tensor([chosen], device=self.x.device))[0]
        self.nearest = row.clone() if self.nearest is None else torch.minimum(self.nearest, row, out=self.nearest)


class Sparse:
    """Every record knows its m nearest records only (itself among them): O(n m) memory, for large n.

    What is maximised is F~(S) = sum_i max(f_i, max_{j in S} s_ij), f_i being the similarity of i to its m-th nearest
    record. F~ is F with similarities below f_i raised to f_i, so it is monotone and submodular too and greedy's
    guarantee holds for it; F <= F~, and F = F~ once every record has a chosen one among its m nearest. Take m of at
    least a few times n / budget, and above the number of copies of a record. The gains are of F~. The search itself
    is exact: all pairs, in blocks, float32 distances to find the neighbours and float64 ones for their similarities.
    """

    def __init__(self, x: Tensor, kernel: Kernel, neighbours: int) -> None:
        n, m = len(x), neighbours
        found, kept = np.empty((n, m), np.int32), np.empty((n, m), np.float32)
        rough = (x - x.mean(0)).float()  # distances stay, and need fewer digits
        norms = (rough * rough).sum(1)
        block = max(1, min(n, BLOCK // max(1, n), BLOCK // (m * x.shape[1])))
        for start in range(0, n, block):
            rows = torch.arange(start, min(start + block, n), device=x.device)
            order = torch.addmm(norms, rough[rows], rough.T, alpha=-2)
            order[rows - start, rows] = -torch.inf  # itself, even among more than m duplicates
            near = order.topk(m, largest=False).indices
            squared = (x[rows][:, None] - x[near]).square_().sum(2)
            squared.masked_fill_(squared <= SAME * (x[rows] ** 2).sum(1, keepdim=True), 0)
            found[start : start + len(rows)] = near.cpu().numpy()
            kept[start : start + len(rows)] = kernel.dissimilarity(squared, x.shape[1]).cpu().numpy()
        self.nearest = kept.max(1)
        # by candidate: which records have it among their neighbours, and how unlike they are
        order_of = np.argsort(found.ravel(), kind="stable")
        self.of = (order_of // m).astype(np.int32)
        self.unlike = kept.ravel()[order_of]
        self.starts = np.concatenate([[0], np.cumsum(np.bincount(found.ravel(), minlength=n))])

    def gains(self, candidates: NDArray[np.int64]) -> NDArray[np.float64]:
        """F~(S + j) - F~(S) of every candidate j, float64."""
        found = np.empty(len(candidates))
        for start in range(0, len(candidates), 4096):
            part = candidates[start : start + 4096]
            counts = self.starts[part + 1] - self.starts[part]
            ends = np.cumsum(counts)
            entries = np.arange(ends[-1]) + np.repeat(self.starts[part] - (ends - counts), counts)
            less = np.maximum(self.nearest[self.of[entries]] - self.unlike[entries], 0)
            # no count is 0, for every record is a neighbour of itself
            found[start : start + len(part)] = np.add.reduceat(less.astype(np.float64), ends - counts)
        return found

    def add(self, chosen: int) -> None:
        """Take record `chosen` into S."""
        entries = slice(self.starts[chosen], self.starts[chosen + 1])
        who = self.of[entries]  # without repeats
        self.nearest[who] = np.minimum(self.nearest[who], self.unlike[entries])
