"""Triton kernels of `lean_kernels.ops.cosine`. All sums are float32; no atomics, so that runs repeat bit for bit."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lean_kernels import _rt

MAX_ROW = 16384  # values of a token that cosine_adjacent holds in registers
MAX_LAYERS = 128  # streams whose [Lp, Lp] tile cosine_gram holds in registers
PROGRAMS = 256  # of cosine_gram, each with a partial sum: fixed, so that the result does not depend on the device
# rows, columns, warps
SIZES = [(1, 1024, 4), (1, 2048, 8), (2, 512, 4), (4, 512, 4), (4, 512, 8), (8, 256, 4), (8, 512, 8)]


def _config(rows: int, columns: int, warps: int) -> Any:
    return triton.Config({"ROWS": rows, "COLUMNS": columns}, num_warps=warps)


@_rt.tune(
    [_config(*size) for size in SIZES],
    key=["H"],
    fallback=_config(4, 512, 4),
)
@triton.jit
def _stream_kernel(
    x, y, mask, cos, zero, T, H, x_t, x_h, y_t, y_h,
    MASKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    h = tl.arange(0, COLUMNS)
    keep = t < T
    if MASKED:
        keep &= tl.load(mask + t, mask=keep, other=0) != 0
    xy = tl.zeros((ROWS, COLUMNS), tl.float32)
    xx = tl.zeros((ROWS, COLUMNS), tl.float32)
    yy = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, H, COLUMNS):
        column = (start + h).to(tl.int64)
        inside = keep[:, None] & (column < H)[None, :]
        a = tl.load(x + t[:, None] * x_t + column[None, :] * x_h, mask=inside, other=0).to(tl.float32)
        b = tl.load(y + t[:, None] * y_t + column[None, :] * y_h, mask=inside, other=0).to(tl.float32)
        xy += a * b
        xx += a * a
        yy += b * b
    size = tl.sqrt(tl.sum(xx, 1)) * tl.sqrt(tl.sum(yy, 1))
    empty = (tl.sum(xx, 1) == 0) | (tl.sum(yy, 1) == 0)
    tl.store(cos + t, tl.where(empty, 0.0, tl.sum(xy, 1) / tl.where(empty, 1.0, size)), mask=t < T)
    tl.store(zero + t, (empty & keep).to(tl.int8), mask=t < T)


@triton.jit
def _adjacent_kernel(
    x, mask, cos, zero, layers, T, H, x_l, x_t, x_h, MASKED: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """One program per token: the vector of the layer before stays in registers, so every value is read once."""
    t = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS).to(tl.int64)
    keep = t < T
    if MASKED:
        keep = tl.load(mask + t) != 0
    inside = column < tl.where(keep, H, 0)
    row = x + t * x_t + column * x_h
    last = tl.load(row, mask=inside, other=0).to(tl.float32)
    last_square = tl.sum(last * last, 0)
    to = t
    for _ in range(1, layers):
        row += x_l
        here = tl.load(row, mask=inside, other=0).to(tl.float32)
        square = tl.sum(here * here, 0)
        size = tl.sqrt(last_square) * tl.sqrt(square)
        empty = (last_square == 0) | (square == 0)
        value = tl.where(empty, 0.0, tl.sum(last * here, 0) / tl.where(empty, 1.0, size))
        tl.store(cos + to, value)
        tl.store(zero + to, (empty & keep).to(tl.int8))
        to += T
        last = here
        last_square = square


@triton.jit
def _gram_kernel(
    x, mask, partial, live, layers, T, H, x_l, x_t, x_h,
    MASKED: tl.constexpr, LAYERS: tl.constexpr, COLUMNS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Each program takes every PROGRAMS-th token: its [Lp, Lp] products, normalised by their diagonal, are summed."""
    layer = tl.arange(0, LAYERS)
    h = tl.arange(0, COLUMNS)
    diagonal = layer[:, None] == layer[None, :]
    total = tl.zeros((LAYERS, LAYERS), tl.float32)
    token = tl.program_id(0).to(tl.int64)
    while token < T:
        keep = layer < layers
        if MASKED:
            keep = layer < tl.where(tl.load(mask + token) != 0, layers, 0)
        rows = x + token * x_t + layer.to(tl.int64)[:, None] * x_l
        products = tl.zeros((LAYERS, LAYERS), tl.float32)
        for start in range(0, H, COLUMNS):
            column = (start + h).to(tl.int64)
            tile = tl.load(rows + column[None, :] * x_h, mask=keep[:, None] & (column < H)[None, :], other=0)
            if UPCAST:
                tile = tile.to(tl.float32)
            products += tl.dot(tile, tl.trans(tile), input_precision="ieee")
        square = tl.sum(tl.where(diagonal, products, 0.0), 1)
        alive = keep & (square != 0)
        scale = tl.where(alive, 1.0 / tl.sqrt(tl.where(alive, square, 1.0)), 0.0)
        both = alive[:, None] & alive[None, :]
        total += tl.where(both, products * scale[:, None] * scale[None, :], 0.0)
        tl.store(live + layer.to(tl.int64) * T + token, alive.to(tl.int8), mask=layer < layers)
        token += tl.num_programs(0)
    to = partial + (tl.program_id(0) * layers + layer)[:, None] * layers + layer[None, :]
    tl.store(to, total, mask=(layer < layers)[:, None] & (layer < layers)[None, :])


@_rt.launcher
def cosine_stream(x: Tensor, y: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    tokens, hidden = x.shape
    cos = torch.empty(tokens, dtype=torch.float32, device=x.device)
    zero = torch.empty(tokens, dtype=torch.int8, device=x.device)
    _stream_kernel[lambda meta: (triton.cdiv(tokens, meta["ROWS"]),)](
        x, y, _bytes(mask, cos), cos, zero, tokens, hidden, *x.stride(), *y.stride(), MASKED=mask is not None
    )
    return cos, zero.view(torch.bool)


@_rt.launcher
def cosine_adjacent(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    layers, tokens, hidden = x.shape
    cos = torch.empty(layers - 1, tokens, dtype=torch.float32, device=x.device)
    zero = torch.empty(layers - 1, tokens, dtype=torch.int8, device=x.device)
    if hidden > MAX_ROW:  # rows too long for registers: pair by pair, each stream but two read twice
        for layer in range(layers - 1):
            cos[layer], zero[layer] = cosine_stream(x[layer], x[layer + 1], mask)
        return cos, zero.view(torch.bool)
    columns = triton.next_power_of_2(hidden)
    _adjacent_kernel[(tokens,)](
        x, _bytes(mask, cos), cos, zero, layers, tokens, hidden, *x.stride(), MASKED=mask is not None,
        COLUMNS=columns, num_warps=min(16, max(1, columns // 1024)),
    )  # fmt: skip
    return cos, zero.view(torch.bool)


@_rt.launcher
def cosine_gram(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    layers, tokens, hidden = x.shape
    programs = min(PROGRAMS, tokens)
    partial = torch.empty(programs, layers, layers, dtype=torch.float32, device=x.device)
    live = torch.empty(layers, tokens, dtype=torch.int8, device=x.device)
    tile = max(_rt.MIN_DOT, triton.next_power_of_2(layers))
    _gram_kernel[(programs,)](
        x, _bytes(mask, partial), partial, live, layers, tokens, hidden, *x.stride(), MASKED=mask is not None,
        LAYERS=tile, COLUMNS=64, UPCAST=_rt.INTERPRET, num_warps=8 if tile > 64 else 4,
    )  # fmt: skip
    alive = live.to(torch.float64)
    return partial.sum(0, dtype=torch.float64), (alive @ alive.T).to(torch.int64)


def _bytes(mask: Tensor | None, unused: Tensor) -> Tensor:
    """The mask as bytes; any pointer where there is none."""
    return unused if mask is None else mask.contiguous().view(torch.int8)
