"""Benchmark of the product with a packed 2:4 weight against the dense product."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from lean_kernels.ops.sparse24 import matmul_24, pack_24

from .harness import Bench


class Shape(NamedTuple):
    M: int
    N: int
    K: int


PRESETS = {
    "small": [Shape(1, 1024, 1024), Shape(256, 1024, 1024)],
    "h200": [Shape(1, 4096, 4096), Shape(16, 11008, 4096), Shape(64, 11008, 4096), Shape(4096, 11008, 4096)],
}


def bench_sparse24(bench: Bench) -> None:
    """A row for each number of rows of x."""
    for shape in PRESETS[bench.shapes]:
        rows, columns, depth = shape
        x = torch.randn(rows, depth, device=bench.device).to(bench.dtype)
        w = torch.randn(columns, depth // 4, 4, device=bench.device)
        w = w.scatter(-1, w.abs().topk(2, largest=False).indices, 0.0).view(columns, depth).to(bench.dtype)
        packed = pack_24(w)
        bench.row(
            "matmul_24",
            shape._asdict(),
            partial(matmul_24, x, packed, backend=bench.backend),
            bytes=sum(t.nbytes for t in packed) + rows * (columns + depth) * bench.dtype.itemsize,
            flops=2 * rows * columns * depth,
            baselines={"dense": partial(linear, x, w)},
        )
