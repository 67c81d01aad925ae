"""Benchmarks of the cosines of hidden-state streams against `torch.nn.functional.cosine_similarity` in float32."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from lean_kernels.ops.cosine import cosine_adjacent, cosine_gram, cosine_stream

from .harness import Bench


class Shape(NamedTuple):
    Lp: int
    T: int
    H: int


PRESETS = {
    "small": [Shape(9, 512, 2048), Shape(5, 2048, 1024)],
    "h200": [Shape(9, 16384, 4096), Shape(33, 8192, 4096), Shape(81, 4096, 8192)],
}


def bench_cosine(bench: Bench) -> None:
    """Rows for two streams, adjacent pairs and all pairs."""
    for shape in PRESETS[bench.shapes]:
        x = torch.randn(*shape, device=bench.device).to(bench.dtype)
        layers, tokens, hidden = shape
        stream = tokens * hidden * bench.dtype.itemsize
        bench.row(
            "cosine_stream",
            {"T": tokens, "H": hidden},
            partial(cosine_stream, x[0], x[1], backend=bench.backend),
            bytes=2 * stream,
            flops=6 * tokens * hidden,
            baselines={"cosine_similarity": partial(similarity, x[0], x[1])},
        )
        bench.row(
            "cosine_adjacent",
            shape._asdict(),
            partial(cosine_adjacent, x, backend=bench.backend),
            bytes=layers * stream,
            flops=4 * layers * tokens * hidden,
            baselines={"cosine_similarity of each pair": partial(all_pairs, x)},
        )
        bench.row(
            "cosine_gram",
            shape._asdict(),
            partial(cosine_gram, x, backend=bench.backend),
            bytes=layers * stream,
            flops=2 * layers * layers * tokens * hidden,
            baselines={"normalize, bmm": partial(units_bmm, x)},
        )


def similarity(x: Tensor, y: Tensor) -> Tensor:
    return cosine_similarity(x.float(), y.float(), dim=-1).mean()


def all_pairs(x: Tensor) -> list[Tensor]:
    return [similarity(a, b) for a, b in pairwise(x)]


def units_bmm(x: Tensor) -> Tensor:
    units = normalize(x.float(), dim=-1).transpose(0, 1)  # [T, Lp, H]
    return torch.bmm(units, units.mT).mean(0)
