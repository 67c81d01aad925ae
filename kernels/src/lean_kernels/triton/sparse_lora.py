"""Triton kernels of `lean_kernels.ops.sparse_lora`: the effective weight exists as one tile in registers.

The mask comes as bits (`ref.sparse_lora.pack_mask`), an eighth of a byte per weight. Gradients of A and B are sums over
tiles in float32: a program sums over some tiles, and torch over the programs; no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lean_kernels import _rt

MAX_RANK = 128  # a tile of A and one of B are held in registers
TILES = 8  # tiles that one program of the gradients sums over


@triton.jit
def _bits(bits, first, n, N, K, BK: tl.constexpr):
    """Mask tile [BN, BK] from column `first`, a multiple of 32: every word is loaded once."""
    words = tl.cdiv(K, 32)
    word = first // 32 + tl.arange(0, BK // 32)
    loaded = tl.load(
        bits + n[:, None] * words + word[None, :], mask=(n < N)[:, None] & (word < words)[None, :], other=0
    )
    on = (loaded[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return tl.reshape(on, (n.shape[0], BK)) != 0


@triton.jit
def _tile(
    w, a, b, bits, first, n, N, K, R, w_n, w_k, a_r, a_k, b_n, b_r, scale,
    RANK: tl.constexpr, UPCAST: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Tile [BN, BK] of mask ⊙ (w + scale · b · a) from column `first`, float32."""
    k = first + tl.arange(0, BK).to(tl.int64)
    r = tl.arange(0, RANK).to(tl.int64)
    left = tl.load(b + n[:, None] * b_n + r[None, :] * b_r, mask=(n < N)[:, None] & (r < R)[None, :], other=0)
    right = tl.load(a + r[:, None] * a_r + k[None, :] * a_k, mask=(r < R)[:, None] & (k < K)[None, :], other=0)
    dense = tl.load(w + n[:, None] * w_n + k[None, :] * w_k, mask=(n < N)[:, None] & (k < K)[None, :], other=0)
    if UPCAST:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    total = dense.to(tl.float32) + scale * tl.dot(left, right, input_precision="ieee")
    return tl.where(_bits(bits, first, n, N, K, BK), total, 0.0)


@triton.jit
def _forward_kernel(
    x, w, a, b, bits, bias, out, M, N, K, R, x_m, x_k, w_n, w_k, a_r, a_k, b_n, b_r, scale,
    RANK: tl.constexpr, BIASED: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BM + tl.arange(0, BM).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN).to(tl.int64)
    total = tl.zeros((BM, BN), tl.float32)
    for first in range(0, K, BK):
        k = first + tl.arange(0, BK).to(tl.int64)
        rows = tl.load(x + m[:, None] * x_m + k[None, :] * x_k, mask=(m < M)[:, None] & (k < K)[None, :], other=0)
        weight = _tile(w, a, b, bits, first, n, N, K, R, w_n, w_k, a_r, a_k, b_n, b_r, scale, RANK, UPCAST, BK)
        if UPCAST:  # the interpreter cannot multiply bfloat16
            total += tl.dot(rows.to(tl.float32), tl.trans(weight), input_precision="ieee")
        else:
            total += tl.dot(rows, tl.trans(weight.to(rows.dtype)), input_precision="ieee")
    if BIASED:
        total += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)[None, :]
    to = out + m[:, None] * N + n[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def _x_grad_kernel(
    grad, w, a, b, bits, out, M, N, K, R, g_m, g_n, w_n, w_k, a_r, a_k, b_n, b_r, scale,
    RANK: tl.constexpr, UPCAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BM + tl.arange(0, BM).to(tl.int64)
    first = tl.program_id(1) * BK
    k = first + tl.arange(0, BK).to(tl.int64)
    total = tl.zeros((BM, BK), tl.float32)
    for start in range(0, N, BN):
        n = start + tl.arange(0, BN).to(tl.int64)
        rows = tl.load(grad + m[:, None] * g_m + n[None, :] * g_n, mask=(m < M)[:, None] & (n < N)[None, :], other=0)
        weight = _tile(w, a, b, bits, first, n, N, K, R, w_n, w_k, a_r, a_k, b_n, b_r, scale, RANK, UPCAST, BK)
        if UPCAST:
            total += tl.dot(rows.to(tl.float32), weight, input_precision="ieee")
        else:
            total += tl.dot(rows, weight.to(rows.dtype), input_precision="ieee")
    tl.store(
        out + m[:, None] * K + k[None, :], total.to(out.dtype.element_ty), mask=(m < M)[:, None] & (k < K)[None, :]
    )


@triton.jit
def _delta(
    grad, x, bits, first, n, M, N, K, g_m, g_n, x_m, x_k, UPCAST: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """Tile [BN, BK] of mask ⊙ (gradᵀ · x) from column `first`, float32."""
    k = first + tl.arange(0, BK).to(tl.int64)
    total = tl.zeros((n.shape[0], BK), tl.float32)
    for start in range(0, M, BM):
        m = start + tl.arange(0, BM).to(tl.int64)
        left = tl.load(grad + m[None, :] * g_m + n[:, None] * g_n, mask=(m < M)[None, :] & (n < N)[:, None], other=0)
        right = tl.load(x + m[:, None] * x_m + k[None, :] * x_k, mask=(m < M)[:, None] & (k < K)[None, :], other=0)
        if UPCAST:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        total += tl.dot(left, right, input_precision="ieee")
    return tl.where(_bits(bits, first, n, N, K, BK), total, 0.0)


@triton.jit
def _b_grad_kernel(
    grad, x, a, bits, partial, M, N, K, R, g_m, g_n, x_m, x_k, a_r, a_k, scale,
    RANK: tl.constexpr, TILES: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """partial[split] = scale · dD · aᵀ over TILES tiles of columns, [N, R]."""
    n = tl.program_id(0) * BN + tl.arange(0, BN).to(tl.int64)
    r = tl.arange(0, RANK).to(tl.int64)
    total = tl.zeros((BN, RANK), tl.float32)
    for tile in range(0, TILES):
        first = (tl.program_id(1) * TILES + tile) * BK
        k = first + tl.arange(0, BK).to(tl.int64)
        delta = _delta(grad, x, bits, first, n, M, N, K, g_m, g_n, x_m, x_k, UPCAST, BM, BK)
        right = tl.load(a + k[:, None] * a_k + r[None, :] * a_r, mask=(k < K)[:, None] & (r < R)[None, :], other=0)
        if UPCAST:
            total += tl.dot(delta, right.to(tl.float32), input_precision="ieee")
        else:
            total += tl.dot(delta.to(right.dtype), right, input_precision="ieee")
    to = partial + (tl.program_id(1).to(tl.int64) * N + n)[:, None] * R + r[None, :]
    tl.store(to, total * scale, mask=(n < N)[:, None] & (r < R)[None, :])


@triton.jit
def _a_grad_kernel(
    grad, x, b, bits, partial, M, N, K, R, g_m, g_n, x_m, x_k, b_n, b_r, scale,
    RANK: tl.constexpr, TILES: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """partial[split] = scale · bᵀ · dD over TILES tiles of rows, [R, K]."""
    first = tl.program_id(0) * BK
    k = first + tl.arange(0, BK).to(tl.int64)
    r = tl.arange(0, RANK).to(tl.int64)
    total = tl.zeros((RANK, BK), tl.float32)
    for tile in range(0, TILES):
        n = (tl.program_id(1) * TILES + tile) * BN + tl.arange(0, BN).to(tl.int64)
        delta = _delta(grad, x, bits, first, n, M, N, K, g_m, g_n, x_m, x_k, UPCAST, BM, BK)
        left = tl.load(b + n[None, :] * b_n + r[:, None] * b_r, mask=(n < N)[None, :] & (r < R)[:, None], other=0)
        if UPCAST:
            total += tl.dot(left.to(tl.float32), delta, input_precision="ieee")
        else:
            total += tl.dot(left, delta.to(left.dtype), input_precision="ieee")
    to = partial + (tl.program_id(1).to(tl.int64) * R + r)[:, None] * K + k[None, :]
    tl.store(to, total * scale, mask=(r < R)[:, None] & (k < K)[None, :])


@_rt.launcher
def sparse_lora_matmul(
    x: Tensor, w: Tensor, a: Tensor, b: Tensor, bits: Tensor, scale: float, bias: Tensor | None
) -> Tensor:
    (rows, depth), (columns, rank) = x.shape, b.shape
    out = x.new_empty(rows, columns)
    wide = x.dtype == torch.float32  # its products take registers: smaller tiles, more threads
    bm = 16 if rows <= 16 else 32 if wide else 64 if rows <= 64 or _rt.INTERPRET else 128
    bn = 32 if wide else 64
    _forward_kernel[(triton.cdiv(rows, bm), triton.cdiv(columns, bn))](
        x, w, a, b, bits.contiguous(), out if bias is None else bias.contiguous(), out, rows, columns, depth, rank,
        *x.stride(), *w.stride(), *a.stride(), *b.stride(), scale, RANK=_padded(rank), BIASED=bias is not None,
        UPCAST=_rt.INTERPRET, BM=bm, BN=bn, BK=32, num_warps=8 if wide or bm == 128 else 4,
    )  # fmt: skip
    return out


@_rt.launcher
def sparse_lora_backward(
    grad: Tensor, x: Tensor, w: Tensor, a: Tensor, b: Tensor, bits: Tensor, scale: float, for_x: bool, for_ab: bool
) -> tuple[Tensor, Tensor, Tensor]:
    (rows, depth), (columns, rank) = x.shape, b.shape
    bits = bits.contiguous()
    x_grad = x.new_empty(x.shape if for_x else (0,))
    wide = x.dtype == torch.float32
    options = {"RANK": _padded(rank), "UPCAST": _rt.INTERPRET, "num_warps": 8 if wide else 4}
    if for_x:
        bm = 16 if rows <= 16 else 64
        _x_grad_kernel[(triton.cdiv(rows, bm), triton.cdiv(depth, 64))](
            grad, w, a, b, bits, x_grad, rows, columns, depth, rank, *grad.stride(), *w.stride(), *a.stride(),
            *b.stride(), scale, BM=bm, BN=32, BK=64, **options,
        )  # fmt: skip
    if not for_ab:
        return x_grad, a.new_empty(0), b.new_empty(0)
    sizes = {"TILES": TILES, "BM": 32, "BN": 64, "BK": 32 if wide else 64, **options}
    splits_a, splits_b = triton.cdiv(columns, sizes["BN"] * TILES), triton.cdiv(depth, sizes["BK"] * TILES)
    a_parts = torch.empty(splits_a, *a.shape, dtype=torch.float32, device=x.device)
    b_parts = torch.empty(splits_b, *b.shape, dtype=torch.float32, device=x.device)
    _a_grad_kernel[(triton.cdiv(depth, sizes["BK"]), splits_a)](
        grad, x, b, bits, a_parts, rows, columns, depth, rank, *grad.stride(), *x.stride(), *b.stride(), scale, **sizes
    )
    _b_grad_kernel[(triton.cdiv(columns, sizes["BN"]), splits_b)](
        grad, x, a, bits, b_parts, rows, columns, depth, rank, *grad.stride(), *x.stride(), *a.stride(), scale, **sizes
    )
    return x_grad, a_parts.sum(0).to(a.dtype), b_parts.sum(0).to(b.dtype)


def _padded(rank: int) -> int:
    return max(_rt.MIN_DOT, int(triton.next_power_of_2(rank)))
