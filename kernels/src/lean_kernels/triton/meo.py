"""Triton kernels of `lean_kernels.ops.meo`.

The forward and the gradient of x are one kernel with other strides. Expert weights are summed in float32 registers and
rounded once to the dtype of the product. No atomics: every element of a gradient belongs to one program.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lean_kernels import _rt

MERGE_BLOCK = 1024
MAX_FUSED = 8  # experts whose weight tiles fit into shared memory together


def _config(columns: int, depth: int, warps: int, stages: int) -> Any:
    return triton.Config({"BN": columns, "BK": depth}, num_warps=warps, num_stages=stages)


def _fits(values: Mapping[str, Any], warps: int, stages: int) -> bool:
    """Whether tiles fit into shared memory; float32 products also need registers, as tensor cores do not make them."""
    rows, columns, depth, size = values["BM"], values["BN"], values["BK"], values["x"].element_size()
    if size == 4 and (rows + depth) * columns > 44 * 32 * warps:
        return False
    shared = stages * depth * (rows + values["EXPERTS"] * columns) * size
    return bool(shared <= _rt.shared_memory(values["x"]))


@triton.jit
def _place_of(tiles):
    """Group and tile of a program. Groups share the first axis of the grid with tiles: the others end at 65535."""
    return (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles


@_rt.tune(
    [_config(n, k, warps, stages) for n, k, warps in ((64, 32, 4), (64, 64, 4), (128, 32, 4), (128, 64, 8))
     for stages in (3, 4)],
    key=["K", "N", "BM", "EXPERTS"],
    fallback=_config(64, 32, 4, 2),
    fits=_fits,
)  # fmt: skip
@triton.jit
def _matmul_kernel(
    x, w, idx, g, shift, out, L, K, N, x_b, x_l, x_k, w_e, w_k, w_n,
    EXPERTS: tl.constexpr, SHIFTED: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[b] = x[b] · Σ_j g[b, j] w[idx[b, j]] + shift[b]. Row tiles come first: a weight tile is read again soon."""
    tiles = tl.cdiv(L, BM)
    b, tile = _place_of(tiles * tl.cdiv(N, BN))
    row = (tile % tiles) * BM + tl.arange(0, BM).to(tl.int64)
    column = (tile // tiles) * BN + tl.arange(0, BN).to(tl.int64)
    depth = tl.arange(0, BK).to(tl.int64)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + depth
        left = tl.load(
            x + b * x_b + row[:, None] * x_l + k[None, :] * x_k, mask=(row < L)[:, None] & (k < K)[None, :], other=0
        )
        merged = tl.zeros((BK, BN), tl.float32)
        for j in tl.static_range(EXPERTS):
            expert = tl.load(idx + b * EXPERTS + j).to(tl.int64)
            part = tl.load(
                w + expert * w_e + k[:, None] * w_k + column[None, :] * w_n,
                mask=(k < K)[:, None] & (column < N)[None, :],
                other=0,
            )
            merged += tl.load(g + b * EXPERTS + j).to(tl.float32) * part.to(tl.float32)
        if UPCAST:  # the interpreter cannot multiply bfloat16
            total += tl.dot(left.to(tl.float32), merged, input_precision="ieee")
        else:
            total += tl.dot(left, merged.to(left.dtype), input_precision="ieee")
    if SHIFTED:
        total += tl.load(shift + b * N + column, mask=column < N, other=0).to(tl.float32)[None, :]
    to = out + (b * L + row)[:, None] * N + column[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=(row < L)[:, None] & (column < N)[None, :])


@triton.jit
def _merge_kernel(
    w, idx, g, out, K, N, w_e, w_k, w_n, blocks, EXPERTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    b, block = _place_of(blocks)
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at // N < K  # K · N may be more than an int32 holds
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(EXPERTS):
        expert = tl.load(idx + b * EXPERTS + j).to(tl.int64)
        tile = tl.load(w + expert * w_e + (at // N) * w_k + (at % N) * w_n, mask=inside, other=0)
        total += tl.load(g + b * EXPERTS + j).to(tl.float32) * tile.to(tl.float32)
    tl.store(out + (b * K) * N + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _products(x, grad, L, k, n, K, N, x_l, x_k, d_l, d_n, UPCAST: tl.constexpr, BL: tl.constexpr):
    """A tile of xᵀ · grad of one group, [BK, BN] float32."""
    total = tl.zeros((k.shape[0], n.shape[0]), tl.float32)
    for start in range(0, L, BL):
        row = start + tl.arange(0, BL).to(tl.int64)
        left = tl.load(x + k[:, None] * x_k + row[None, :] * x_l, mask=(k < K)[:, None] & (row < L)[None, :], other=0)
        right = tl.load(
            grad + row[:, None] * d_l + n[None, :] * d_n, mask=(row < L)[:, None] & (n < N)[None, :], other=0
        )
        if UPCAST:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        total += tl.dot(left, right, input_precision="ieee")
    return total


@triton.jit
def _weight_grad_kernel(
    x, grad, idx, g, out, B, L, K, N, x_b, x_l, x_k, d_b, d_l, d_n,
    EXPERTS: tl.constexpr, UPCAST: tl.constexpr, BL: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A tile of one expert's gradient: the sum over the groups that use it of gate · xᵀ · grad."""
    expert = tl.program_id(1).to(tl.int64)
    tiles = tl.cdiv(N, BN)
    k = (tl.program_id(0) // tiles) * BK + tl.arange(0, BK).to(tl.int64)
    n = (tl.program_id(0) % tiles) * BN + tl.arange(0, BN).to(tl.int64)
    total = tl.zeros((BK, BN), tl.float32)
    b = tl.program_id(1).to(tl.int64) * 0
    while b < B:
        gate = 0.0
        used = 0
        for j in tl.static_range(EXPERTS):
            here = tl.load(idx + b * EXPERTS + j).to(tl.int64) == expert
            gate += tl.where(here, tl.load(g + b * EXPERTS + j).to(tl.float32), 0.0)
            used += here.to(tl.int32)
        if used > 0:
            total += gate * _products(x + b * x_b, grad + b * d_b, L, k, n, K, N, x_l, x_k, d_l, d_n, UPCAST, BL)
        b += 1
    to = out + (expert * K + k)[:, None] * N + n[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=(k < K)[:, None] & (n < N)[None, :])


@triton.jit
def _gate_grad_kernel(
    x, grad, w, idx, partial, L, K, N, x_b, x_l, x_k, d_b, d_l, d_n, w_e, w_k, w_n, tiles,
    EXPERTS: tl.constexpr, UPCAST: tl.constexpr, BL: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One tile's part of ⟨xᵀ · grad, w[idx[b, j]]⟩ for every j: the product is computed once for all experts."""
    b, tile = _place_of(tiles)
    across = tl.cdiv(N, BN)
    k = (tile // across) * BK + tl.arange(0, BK).to(tl.int64)
    n = (tile % across) * BN + tl.arange(0, BN).to(tl.int64)
    product = _products(x + b * x_b, grad + b * d_b, L, k, n, K, N, x_l, x_k, d_l, d_n, UPCAST, BL)
    inside = (k < K)[:, None] & (n < N)[None, :]
    for j in tl.static_range(EXPERTS):
        expert = tl.load(idx + b * EXPERTS + j).to(tl.int64)
        weight = tl.load(w + expert * w_e + k[:, None] * w_k + n[None, :] * w_n, mask=inside, other=0)
        to = partial + (b * EXPERTS + j) * tiles + tile
        tl.store(to, tl.sum(tl.sum(product * weight.to(tl.float32), 1), 0))


@_rt.launcher
def merged_matmul(x: Tensor, w: Tensor, idx: Tensor, g: Tensor, shift: Tensor | None) -> Tensor:
    """Fused where weights are read few enough times, else merged into memory first and multiplied by torch."""
    (batch, length, depth), (_, _, columns), experts = x.shape, w.shape, idx.shape[1]
    # a tile of 32 float32 rows is what registers hold
    rows = 16 if length <= 16 else 32 if x.dtype == torch.float32 else 64 if length <= 64 else 128
    passes = triton.cdiv(length, rows)
    # times K·N elements moved: fused, and merged first
    if experts > MAX_FUSED or experts * passes > experts + 1 + passes:
        merged = merge_experts(w, idx, g)
        return torch.bmm(x, merged) if shift is None else torch.baddbmm(shift[:, None].to(x.dtype), x, merged)
    out = x.new_empty(batch, length, columns)
    _matmul_kernel[lambda meta: (passes * triton.cdiv(columns, meta["BN"]) * batch,)](
        x, w, idx.contiguous(), g.contiguous(), out if shift is None else shift.contiguous(), out, length, depth,
        columns, *x.stride(), *w.stride(), EXPERTS=experts, SHIFTED=shift is not None, UPCAST=_rt.INTERPRET, BM=rows,
    )  # fmt: skip
    return out


@_rt.launcher
def merge_experts(w: Tensor, idx: Tensor, g: Tensor) -> Tensor:
    """Merged weights of every group, [Bg, K, N]."""
    (batch, experts), (_, depth, columns) = idx.shape, w.shape
    out = w.new_empty(batch, depth, columns)
    blocks = triton.cdiv(depth * columns, MERGE_BLOCK)
    _merge_kernel[(blocks * batch,)](
        w, idx.contiguous(), g.contiguous(), out, depth, columns, *w.stride(), blocks,
        EXPERTS=experts, BLOCK=MERGE_BLOCK,
    )  # fmt: skip
    return out


@_rt.launcher
def merged_matmul_backward(
    x: Tensor, w: Tensor, idx: Tensor, g: Tensor, grad: Tensor, for_w: bool, for_g: bool
) -> tuple[Tensor, Tensor]:
    (batch, length, depth), columns, experts = x.shape, w.shape[2], idx.shape[1]
    idx, g = idx.contiguous(), g.contiguous()
    tile = 64 if not _rt.INTERPRET else 32
    tiles = triton.cdiv(depth, tile) * triton.cdiv(columns, tile)
    options = {"EXPERTS": experts, "UPCAST": _rt.INTERPRET, "BL": 32, "BK": tile, "BN": tile}
    w_grad, g_grad = w.new_empty(w.shape if for_w else (0,)), g.new_empty(g.shape if for_g else (0,))
    if for_w:
        _weight_grad_kernel[(tiles, w.shape[0])](
            x, grad, idx, g, w_grad, batch, length, depth, columns, *x.stride(), *grad.stride(), **options
        )
    if for_g:
        partial = torch.empty(batch, experts, tiles, dtype=torch.float32, device=x.device)
        _gate_grad_kernel[(tiles * batch,)](
            x, grad, w, idx, partial, length, depth, columns, *x.stride(), *grad.stride(), *w.stride(), tiles, **options
        )
        g_grad = partial.sum(-1).to(g.dtype)
    return w_grad, g_grad
