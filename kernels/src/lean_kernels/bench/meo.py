"""Benchmarks of the merged-expert product against merging by einsum, and against a mixture of all experts' outputs."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lean_kernels.ops.meo import merged_matmul

from .harness import Bench


class Shape(NamedTuple):
    Bg: int
    L: int
    K: int
    N: int
    E: int
    e: int
    distinct: int  # different groups among Bg


PRESETS = {
    "small": [
        Shape(1, 1, 768, 1536, 8, 2, 1), Shape(4, 64, 768, 1536, 8, 2, 4), Shape(8, 64, 768, 1536, 8, 4, 1),
    ],
    "h200": [
        Shape(1, 1, 4096, 11008, 8, 2, 1), Shape(1, 64, 4096, 11008, 8, 2, 1), Shape(8, 128, 4096, 11008, 8, 2, 8),
        Shape(8, 2048, 4096, 11008, 8, 2, 8),
    ],
}  # fmt: skip


def bench_meo(bench: Bench) -> None:
    """A row for each number of rows, and for groups that share their experts."""
    for shape in PRESETS[bench.shapes]:
        x = torch.randn(shape.Bg, shape.L, shape.K, device=bench.device).to(bench.dtype)
        w = (torch.randn(shape.E, shape.K, shape.N, device=bench.device) * shape.K**-0.5).to(bench.dtype)
        kind = torch.arange(shape.Bg, device=bench.device) % shape.distinct
        scores = torch.randn(shape.distinct, shape.E, device=bench.device)[kind]
        g, idx = (t.contiguous() for t in scores.softmax(-1).topk(shape.e))
        g = g.to(bench.dtype)
        merged = shape.e * shape.distinct
        bench.row(
            "merged_matmul",
            shape._asdict(),
            partial(merged_matmul, x, w, idx, g, backend=bench.backend),
            bytes=bench.dtype.itemsize
            * (shape.Bg * shape.L * (shape.K + shape.N) + min(merged, shape.E) * shape.K * shape.N),
            flops=2 * shape.K * shape.N * (shape.Bg * shape.L + merged),
            baselines={
                "einsum, bmm": partial(merge_by_einsum, x, w, idx, g),
                "outputs": partial(mixture_of_outputs, x, w, idx, g),
            },
        )


def merge_by_einsum(x: Tensor, w: Tensor, idx: Tensor, g: Tensor) -> Tensor:
    return torch.bmm(x, torch.einsum("be,bekn->bkn", g, w[idx]))


def mixture_of_outputs(x: Tensor, w: Tensor, idx: Tensor, g: Tensor) -> Tensor:
    out = [sum(gate * (rows @ w[i]) for i, gate in zip(experts, gates)) for rows, experts, gates in zip(x, idx, g)]
    return torch.stack(out)
