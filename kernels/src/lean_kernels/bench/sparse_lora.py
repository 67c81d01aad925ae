"""Benchmarks of LoRA on pruned weights against the materialised product, with plain LoRA for comparison."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from lean_kernels.ops.sparse_lora import pack_mask, sparse_lora_matmul

from .harness import Bench

SCALE = 0.5


class Shape(NamedTuple):
    M: int
    N: int
    K: int
    r: int


PRESETS = {
    "small": [Shape(16, 1024, 1024, 8), Shape(512, 1024, 1024, 8)],
    "h200": [Shape(2048, 4096, 4096, 16), Shape(8192, 4096, 4096, 16), Shape(8192, 11008, 4096, 16)],
}


def bench_sparse_lora(bench: Bench) -> None:
    """Rows for the forward, and for forward and backward with either gradients of a and b."""
    for shape in PRESETS[bench.shapes]:
        rows, columns, depth, rank = shape
        x, w, a, b = (
            (torch.randn(*size, device=bench.device) * size[-1] ** -0.5).to(bench.dtype)
            for size in ((rows, depth), (columns, depth), (rank, depth), (columns, rank))
        )
        mask = torch.rand(columns, depth, device=bench.device) < 0.5
        # a CPU unpacks bits slower than it reads bytes
        kept = mask if bench.device == "cpu" and bench.backend != "triton" else pack_mask(mask)
        ours = partial(sparse_lora_matmul, w=w, mask=kept, scale=SCALE, backend=bench.backend)
        baselines = {"materialised": partial(materialised, w=w, mask=mask), "plain LoRA, no mask": partial(plain, w=w)}
        weights = columns * depth
        moved = (weights + (rows + rank) * (columns + depth)) * bench.dtype.itemsize + weights // 8
        bench.row(
            "sparse_lora_matmul",
            {**shape._asdict(), "train": 0, "exact": 0},
            partial(ours, x, a=a, b=b),
            bytes=moved,
            flops=2 * weights * (rows + rank),
            baselines={name: partial(run, x, a=a, b=b) for name, run in baselines.items()},
        )
        leaves = {name: t.clone().requires_grad_() for name, t in {"x": x, "a": a, "b": b}.items()}
        for exact in (1, 0):
            train = partial(ours, straight_through=not exact)
            products = 2 + exact  # of the weight's size and all rows
            bench.row(
                "sparse_lora_matmul",
                {**shape._asdict(), "train": 1, "exact": exact},
                partial(step, train, leaves),
                bytes=2 * moved,
                flops=2 * weights * (products * rows + 2 * (products - 1) * rank),  # the weight made twice, delta read
                baselines={name: partial(step, run, leaves) for name, run in baselines.items()},
            )


def materialised(x: Tensor, w: Tensor, a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    return linear(x, (w + SCALE * (b @ a)) * mask)


def plain(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return linear(x, w) + SCALE * linear(linear(x, a), b)


def step(run: Callable[..., Tensor], leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        out = run(**leaves)
        return torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))
