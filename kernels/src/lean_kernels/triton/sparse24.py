"""Triton kernel of `lean_kernels.ops.sparse24`: 2:4 weights become dense in registers, so memory gives 9/16 of them."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lean_kernels import _rt

SMALL = 64  # rows of x up to which the weight's memory is the time


@triton.jit
def _matmul_kernel(
    x, values, places, bias, out, M, N, K, x_m, x_k,
    BIASED: tl.constexpr, UPCAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BM + tl.arange(0, BM).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN).to(tl.int64)
    words = tl.cdiv(K, 32)
    total = tl.zeros((BM, BN), tl.float32)
    for first in range(0, K, BK):
        k = first + tl.arange(0, BK).to(tl.int64)
        half = first // 2 + tl.arange(0, BK // 2).to(tl.int64)
        word = first // 32 + tl.arange(0, BK // 32)
        rows = tl.load(x + m[:, None] * x_m + k[None, :] * x_k, mask=(m < M)[:, None] & (k < K)[None, :], other=0)
        inside = (n < N)[:, None] & (half < K // 2)[None, :]
        pair = tl.load(values + n[:, None] * (K // 2) + half[None, :], mask=inside, other=0)
        if UPCAST:
            rows = rows.to(tl.float32)
            pair = pair.to(tl.float32)
        first_value, second_value = tl.split(tl.reshape(pair, (BN, BK // 4, 2)))
        inside = (n < N)[:, None] & (word < words)[None, :]
        packed = tl.load(places + n[:, None] * words + word[None, :], mask=inside, other=0)
        nibble = tl.reshape((packed[:, :, None] >> (4 * tl.arange(0, 8))[None, None, :]) & 15, (BN, BK // 4))
        place = tl.arange(0, 4)[None, None, :]
        second = tl.where(place == (nibble >> 2)[:, :, None], second_value[:, :, None], 0.0)
        weight = tl.where(place == (nibble & 3)[:, :, None], first_value[:, :, None], second.to(pair.dtype))
        total += tl.dot(rows, tl.trans(tl.reshape(weight, (BN, BK))), input_precision="ieee")
    if BIASED:
        total += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)[None, :]
    to = out + m[:, None] * N + n[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@_rt.launcher
def matmul_24(x: Tensor, values: Tensor, places: Tensor, bias: Tensor | None) -> Tensor:
    (rows, depth), columns = x.shape, values.shape[0]
    out = x.new_empty(rows, columns)
    bm = 16 if rows <= 16 else 64
    _matmul_kernel[(triton.cdiv(rows, bm), triton.cdiv(columns, 32))](
        x, values.contiguous(), places.contiguous(), out if bias is None else bias.contiguous(), out, rows, columns,
        depth, *x.stride(), BIASED=bias is not None, UPCAST=_rt.INTERPRET, BM=bm, BN=32, BK=64, num_warps=4,
    )  # fmt: skip
    return out
