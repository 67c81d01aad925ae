"""Triton kernels of `lean_kernels.ops.mod`: one program for a row and a block of its hidden values.

Indices of a sequence are unique, so that no atomics are needed and runs repeat bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lean_kernels import _rt

BLOCK = 2048  # values: 16 bytes per thread and load with 4 to 8 warps
# A condition of a program goes into the bound of its mask: the interpreter of Triton 3.9 reads no mask that is made of
# a scalar and a block.


@triton.jit
def _gather_kernel(
    x, idx, counts, out, k, H, x_b, x_s, x_h, COUNTED: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    b, j = tl.program_id(0).to(tl.int64) // k, tl.program_id(0).to(tl.int64) % k
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    keep = j < k
    if COUNTED:
        keep = j < tl.load(counts + b)
    at = tl.load(idx + b * k + j, mask=keep, other=0).to(tl.int64)
    row = tl.load(x + b * x_b + at * x_s + column * x_h, mask=column < tl.where(keep, H, 0), other=0)
    tl.store(out + (b * k + j) * H + column, row, mask=column < H)


@triton.jit
def _gather_norm_kernel(
    x, idx, counts, weight, out, k, H, eps, x_b, x_s, x_h, COUNTED: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """RMSNorm on the way: the row is read for its mean square, and again, from cache, to be scaled."""
    b, j = tl.program_id(0).to(tl.int64) // k, tl.program_id(0).to(tl.int64) % k
    keep = j < k
    if COUNTED:
        keep = j < tl.load(counts + b)
    row = x + b * x_b + tl.load(idx + b * k + j, mask=keep, other=0).to(tl.int64) * x_s
    h = tl.arange(0, COLUMNS).to(tl.int64)
    squares = tl.zeros((COLUMNS,), tl.float32)
    end = tl.where(keep, H, 0)
    for start in range(0, H, COLUMNS):
        value = tl.load(row + (start + h) * x_h, mask=start + h < end, other=0).to(tl.float32)
        squares += value * value
    scale = 1.0 / tl.sqrt(tl.sum(squares, 0) / H + eps)
    for start in range(0, H, COLUMNS):
        column = start + h
        value = tl.load(row + column * x_h, mask=column < end, other=0).to(tl.float32)
        value = value * scale * tl.load(weight + column, mask=column < H, other=0).to(tl.float32)
        tl.store(out + (b * k + j) * H + column, value.to(out.dtype.element_ty), mask=column < H)


@triton.jit
def _add_kernel(
    x, y, idx, gate, counts, k, H, x_b, x_s, x_h, y_b, y_k, y_h,
    GATED: tl.constexpr, COUNTED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x[b, idx[b, j]] += gate[b, j] · y[b, j], in place."""
    b, j = tl.program_id(0).to(tl.int64) // k, tl.program_id(0).to(tl.int64) % k
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    keep = j < k
    if COUNTED:
        keep = j < tl.load(counts + b)
    inside = column < tl.where(keep, H, 0)
    added = tl.load(y + b * y_b + j * y_k + column * y_h, mask=inside, other=0).to(tl.float32)
    if GATED:
        added *= tl.load(gate + b * k + j, mask=keep, other=0).to(tl.float32)
    to = x + b * x_b + tl.load(idx + b * k + j, mask=keep, other=0).to(tl.int64) * x_s + column * x_h
    value = tl.load(to, mask=inside, other=0).to(tl.float32) + added
    tl.store(to, value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _place_kernel(
    x, y, place, gate, out, S, k, H, x_b, x_s, x_h, y_b, y_k, y_h,
    ONTO: tl.constexpr, GATED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[b, s] = x[b, s] + gate · y[b, place[b, s]], or x[b, s] alone where place is -1; x is 0 unless ONTO."""
    b, s = tl.program_id(0).to(tl.int64) // S, tl.program_id(0).to(tl.int64) % S
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < H
    j = tl.load(place + b * (S + 1) + s).to(tl.int64)
    keep = column < tl.where(j >= 0, H, 0)
    value = tl.load(y + b * y_b + j * y_k + column * y_h, mask=keep, other=0).to(tl.float32)
    if GATED:
        value *= tl.load(gate + b * k + j, mask=j >= 0, other=0).to(tl.float32)
    if ONTO:
        onto = tl.load(x + b * x_b + s * x_s + column * x_h, mask=inside, other=0).to(tl.float32)
        value = tl.where(keep, onto + value, onto)  # a gate of infinity elsewhere must not reach this row
    tl.store(out + (b * S + s) * H + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_backward_kernel(
    grad, y, idx, gate, counts, y_grad, gate_grad, k, H, g_b, g_s, g_h, y_b, y_k, y_h,
    COUNTED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    b, j = tl.program_id(0).to(tl.int64) // k, tl.program_id(0).to(tl.int64) % k
    keep = j < k
    if COUNTED:
        keep = j < tl.load(counts + b)
    scale = tl.load(gate + b * k + j, mask=keep, other=0).to(tl.float32)
    row = grad + b * g_b + tl.load(idx + b * k + j, mask=keep, other=0).to(tl.int64) * g_s
    end = tl.where(keep, H, 0)
    h = tl.arange(0, COLUMNS).to(tl.int64)
    products = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, H, COLUMNS):
        column = start + h
        inside = column < end
        down = tl.load(row + column * g_h, mask=inside, other=0).to(tl.float32)
        products += down * tl.load(y + b * y_b + j * y_k + column * y_h, mask=inside, other=0).to(tl.float32)
        value = tl.where(inside, down * scale, 0.0)
        tl.store(y_grad + (b * k + j) * H + column, value.to(y_grad.dtype.element_ty), mask=column < H)
    tl.store(gate_grad + b * k + j, tl.sum(products, 0).to(gate_grad.dtype.element_ty))


@_rt.launcher
def token_gather(x: Tensor, idx: Tensor, counts: Tensor | None, norm_weight: Tensor | None, eps: float) -> Tensor:
    (batch, k), hidden = idx.shape, x.shape[2]
    out = x.new_empty(batch, k, hidden)
    idx = idx.contiguous()
    counted = {"COUNTED": counts is not None, **_columns(hidden)}
    if norm_weight is None:
        grid = (batch * k, triton.cdiv(hidden, counted["COLUMNS"]))
        _gather_kernel[grid](x, idx, _or(counts, idx), out, k, hidden, *x.stride(), **counted)
    else:
        _gather_norm_kernel[(batch * k,)](
            x, idx, _or(counts, idx), norm_weight.contiguous(), out, k, hidden, eps, *x.stride(), **counted
        )
    return out


@_rt.launcher
def token_scatter_add_(x: Tensor, y: Tensor, idx: Tensor, gate: Tensor | None, counts: Tensor | None) -> None:
    (batch, k), hidden = idx.shape, x.shape[2]
    idx = idx.contiguous()
    options = _columns(hidden)
    _add_kernel[(batch * k, triton.cdiv(hidden, options["COLUMNS"]))](
        x, y, idx, _or(gate, y), _or(counts, idx), k, hidden, *x.stride(), *y.stride(), GATED=gate is not None,
        COUNTED=counts is not None, **options,
    )  # fmt: skip


@_rt.launcher
def token_scatter_add(x: Tensor, y: Tensor, idx: Tensor, gate: Tensor | None, counts: Tensor | None) -> Tensor:
    return _place(x, y, idx, gate, counts, x.shape[1])


@_rt.launcher
def token_scatter(y: Tensor, idx: Tensor, counts: Tensor | None, tokens: int) -> Tensor:
    return _place(None, y, idx, None, counts, tokens)


def _place(x: Tensor | None, y: Tensor, idx: Tensor, gate: Tensor | None, counts: Tensor | None, tokens: int) -> Tensor:
    """One pass over all rows of the output, x and y read once each: less than a copy and an addition in place."""
    batch, k, hidden = y.shape
    position = torch.arange(k, device=y.device, dtype=torch.int32).expand(batch, k)
    slot = idx.long() if counts is None else torch.where(position < counts[:, None], idx.long(), tokens)
    # one place more than there are tokens: where the padding goes
    place = torch.full((batch, tokens + 1), -1, device=y.device, dtype=torch.int32).scatter_(1, slot, position)
    out = y.new_empty(batch, tokens, hidden) if x is None else x.new_empty(x.shape)
    onto, options = y if x is None else x, _columns(hidden)
    _place_kernel[(batch * tokens, triton.cdiv(hidden, options["COLUMNS"]))](
        onto, y, place, _or(gate, y), out, tokens, k, hidden, *onto.stride(), *y.stride(), ONTO=x is not None,
        GATED=gate is not None, **options,
    )  # fmt: skip
    return out


@_rt.launcher
def token_scatter_add_backward(
    grad: Tensor, y: Tensor, idx: Tensor, gate: Tensor, counts: Tensor | None
) -> tuple[Tensor, Tensor]:
    (batch, k), hidden = idx.shape, y.shape[2]
    y_grad = y.new_empty(y.shape)
    gate_grad = gate.new_empty(gate.shape)
    idx = idx.contiguous()
    _add_backward_kernel[(batch * k,)](
        grad, y, idx, gate, _or(counts, idx), y_grad, gate_grad, k, hidden, *grad.stride(), *y.stride(),
        COUNTED=counts is not None, **_columns(hidden),
    )  # fmt: skip
    return y_grad, gate_grad


def _columns(hidden: int) -> dict[str, Any]:
    columns = min(BLOCK, max(_rt.MIN_DOT, triton.next_power_of_2(hidden)))
    return {"COLUMNS": columns, "num_warps": max(1, min(4, columns // 512))}


def _or(tensor: Tensor | None, unused: Tensor) -> Tensor:
    """Any pointer of the kind where there is no tensor: the kernel does not read it."""
    return unused if tensor is None else tensor.contiguous()
