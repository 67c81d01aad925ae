"""Benchmarks of gathering and scattering tokens against torch's indexing."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lean_kernels.ops.mod import route, token_gather, token_scatter_add

from .harness import Bench


class Shape(NamedTuple):
    B: int
    S: int
    H: int
    k: int


PRESETS = {
    "small": [Shape(2, 1024, 1024, 512), Shape(1, 2048, 2048, 256)],
    "h200": [Shape(8, 4096, 4096, 2048), Shape(1, 8192, 4096, 1024), Shape(1, 8, 1 << 24, 4)],
}


def bench_mod(bench: Bench) -> None:
    """Rows for the gather and the gated scatter, in place and not."""
    for shape in PRESETS[bench.shapes]:
        batch, tokens, hidden, k = shape
        x = torch.randn(batch, tokens, hidden, device=bench.device).to(bench.dtype)
        y = torch.randn(batch, k, hidden, device=bench.device).to(bench.dtype)
        idx, gate, _ = route(torch.rand(batch, tokens, device=bench.device).to(bench.dtype), capacity=k)
        all_rows, chosen = (t.numel() * bench.dtype.itemsize for t in (x, y))
        bench.row(
            "token_gather",
            shape._asdict(),
            partial(token_gather, x, idx, backend=bench.backend),
            bytes=2 * chosen,
            flops=0,
            baselines={
                "gather": partial(gather, x, idx),
                "x[rows, idx]": partial(fancy_index, x, idx),
            },
        )
        bench.row(
            "token_scatter_add",
            {**shape._asdict(), "inplace": 0},
            partial(token_scatter_add, x, y, idx, gate, backend=bench.backend),
            bytes=2 * all_rows + chosen,
            flops=2 * y.numel(),
            baselines={"scatter_add": partial(scatter_add, x, y, idx, gate)},
        )
        bench.row(
            "token_scatter_add",
            {**shape._asdict(), "inplace": 1},
            partial(token_scatter_add, x.clone(), y, idx, gate, inplace=True, backend=bench.backend),
            bytes=3 * chosen,
            flops=2 * y.numel(),
            baselines={
                "index_select, mul, index_add": partial(index_add, x, y, idx, gate),
                "index_add_": partial(index_add, x.clone(), y, idx, gate, inplace=True),
            },
        )


def gather(x: Tensor, idx: Tensor) -> Tensor:
    return x.gather(1, idx[..., None].expand(-1, -1, x.shape[2]))


def fancy_index(x: Tensor, idx: Tensor) -> Tensor:
    return x[torch.arange(len(x), device=x.device)[:, None], idx]


def scatter_add(x: Tensor, y: Tensor, idx: Tensor, gate: Tensor) -> Tensor:
    return x.scatter_add(1, idx[..., None].expand_as(y), y * gate[..., None])


def index_add(x: Tensor, y: Tensor, idx: Tensor, gate: Tensor, inplace: bool = False) -> Tensor:
    rows = (idx + torch.arange(len(x), device=x.device)[:, None] * x.shape[1]).flatten()
    add = x.view(-1, x.shape[2]).index_add_ if inplace else x.view(-1, x.shape[2]).index_add
    return add(0, rows, (y * gate[..., None]).flatten(0, 1))
