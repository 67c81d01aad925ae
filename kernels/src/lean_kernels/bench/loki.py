"""Benchmark of `loki_decode` against dense attention of the same queries."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lean_kernels.ops.loki import loki_decode
from lean_kernels.ref import loki as ref

from .harness import Bench, Run

WIDTH, LOW = 128, 32
# buffers that take turns hold more than a GPU's second cache, which would keep a small cache whole
ROTATED = 200 << 20


@dataclass(frozen=True)
class Shape:
    batch: int
    heads: int
    kv_heads: int
    tokens: int


PRESETS = {
    "small": [Shape(1, 32, 8, tokens) for tokens in (8192, 32768)],
    "h200": [
        Shape(batch, 32, kv_heads, tokens)
        for batch, kv_heads, tokens in itertools.product((1, 8, 32), (8, 32), (8192, 16384, 32768, 65536))
        if batch * kv_heads * tokens <= 8 * 8 * 65536  # 17 GB of cache, four times over
    ],
}
SHARES = (0.25, 0.125)  # of the tokens that are read


def bench_loki(bench: Bench) -> None:
    """Rows for each shape and share of tokens."""
    for shape, share in itertools.product(PRESETS[bench.shapes], SHARES):
        topk = int(shape.tokens * share)
        caches = [_cache(bench, shape) for _ in range(_buffers(bench, shape))]
        dense = [dense_forms(q, k, v, lens) for q, k, v, lens in caches]
        item = bench.dtype.itemsize
        # low keys, scores out and in, chosen rows of both planes and their numbers
        per_head = shape.tokens * (LOW * item + 8) + topk * (2 * WIDTH * item + 4)
        bench.row(
            "loki_decode",
            {"B": shape.batch, "Hq": shape.heads, "Hkv": shape.kv_heads, "S": shape.tokens, "D": WIDTH, "d": LOW,
             "topk": topk},
            _turns([_sparse(bench, cache, topk) for cache in caches]),
            bytes=shape.batch * shape.kv_heads * per_head,
            flops=2 * shape.batch * shape.heads * (shape.tokens * LOW + 2 * topk * WIDTH),
            baselines={name: _turns([forms[name] for forms in dense]) for name in dense[0]},
        )  # fmt: skip


Cache = tuple[Tensor, Tensor, Tensor, Tensor]


def _buffers(bench: Bench, shape: Shape) -> int:
    size = 2 * shape.batch * shape.kv_heads * shape.tokens * WIDTH * bench.dtype.itemsize
    return 1 if bench.device == "cpu" else max(4, -(-ROTATED // size))


def _cache(bench: Bench, shape: Shape) -> Cache:
    """q, k, v and the lengths."""

    def random(heads: int, tokens: int) -> Tensor:
        return torch.randn(shape.batch, heads, tokens, WIDTH, device=bench.device).to(bench.dtype)

    q, k, v = random(shape.heads, 1), random(shape.kv_heads, shape.tokens), random(shape.kv_heads, shape.tokens)
    lens = torch.full((shape.batch,), shape.tokens, dtype=torch.int32, device=bench.device)
    return q, k, v, lens


def _turns(runs: list[Run]) -> Run:
    """Each call takes the next of the runs."""
    turn = itertools.cycle(runs)
    return lambda: next(turn)()


def _sparse(bench: Bench, cache: Cache, topk: int) -> Run:
    q, k, v, lens = cache
    return lambda: loki_decode(q, k, v, lens, d=LOW, topk=topk, scale=WIDTH**-0.5, backend=bench.backend)


def dense_forms(q: Tensor, k: Tensor, v: Tensor, lens: Tensor) -> dict[str, Run]:
    """The ways to attend to all tokens in torch, ours on a CPU among them: q [B, Hq, 1, D], k and v [B, Hkv, S, D].

    Our C code that reads all tokens is none of them: it is `loki_decode` with everything chosen.
    """
    scale = q.shape[-1] ** -0.5
    packed = q.unflatten(1, (k.shape[1], -1))[..., 0, :]  # [B, Hkv, G, D]
    forms: dict[str, Run] = {
        "sdpa_packed": lambda: scaled_dot_product_attention(packed, k, v),
        "sdpa_gqa": lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True),
        "matmul_softmax": lambda: ((packed @ k.transpose(-1, -2)).float() * scale).softmax(-1).to(v.dtype) @ v,
    }
    if q.device.type == "cpu":
        forms["dense_decode"] = lambda: ref.dense_decode(q, k, v, lens, scale=scale)
    return forms
