"""Benchmark of `linear_ce` against torch's cross-entropy on logits that are formed first."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy

from lean_kernels.ops.linear_ce import linear_ce

from .harness import Bench


class Shape(NamedTuple):
    T: int
    H: int
    V: int


PRESETS = {
    "small": [Shape(256, 512, 32000), Shape(1024, 256, 8000)],
    "h200": [Shape(8192, 4096, 128256), Shape(4096, 2048, 32000), Shape(1024, 4096, 151936)],
}


def bench_linear_ce(bench: Bench) -> None:
    """Rows for losses alone and for all that `linear_ce` returns."""
    for shape in PRESETS[bench.shapes]:
        h = torch.randn(shape.T, shape.H, device=bench.device).to(bench.dtype)
        weight = (torch.randn(shape.V, shape.H, device=bench.device) * shape.H**-0.5).to(bench.dtype)
        target = torch.randint(shape.V, (shape.T,), device=bench.device)
        for fields in (("loss",), ("loss", "lse", "target_logit", "entropy", "rank", "argmax")):
            bench.row(
                "linear_ce",
                {**shape._asdict(), "fields": len(fields)},
                lambda h=h, weight=weight, target=target, fields=fields: linear_ce(  # type: ignore[misc]
                    h, weight, target, return_=fields, backend=bench.backend
                ),
                bytes=(shape.T + shape.V) * shape.H * bench.dtype.itemsize,
                flops=2 * shape.T * shape.V * shape.H,
                baselines={
                    # float32 after the product: the logits themselves are rounded to the operands' dtype
                    "cross_entropy": lambda h=h, weight=weight, target=target: cross_entropy(  # type: ignore[misc]
                        (h @ weight.T).float(), target, reduction="none"
                    )
                },
            )
