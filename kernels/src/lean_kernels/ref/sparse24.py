"""2:4 sparsity in plain torch: packing, and the CPU path of `lean_kernels.ops.sparse24` and its oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from lean_kernels._rt import product_dtype

CHUNK = 1 << 18  # weights unpacked at a time
MIN_ROWS = 128


def pack(w: Tensor) -> tuple[Tensor, Tensor]:
    """Values [N, K / 2] and positions, int32 [N, ceil(K / 32)]: 4 bits a group of 4, first place and second place."""
    rows, columns = w.shape
    groups = w.view(rows, -1, 4)
    # nonzero places first, then as many zeros as it takes to make two, in order again
    place = (groups == 0).to(torch.uint8).sort(dim=-1, stable=True).indices[..., :2].sort(dim=-1).values
    values = groups.gather(-1, place).view(rows, columns // 2)
    nibble = torch.nn.functional.pad(place[..., 0] | place[..., 1] << 2, (0, -(columns // 4) % 8)).view(rows, -1, 8)
    words = (nibble << 4 * torch.arange(8, device=w.device)).sum(-1)
    return values, torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack(values: Tensor, places: Tensor) -> Tensor:
    """The dense matrix [N, K]."""
    rows, half = values.shape
    shift = 4 * torch.arange(8, device=values.device, dtype=torch.int32)
    nibble = ((places[:, :, None] >> shift) & 15).flatten(1)[:, : half // 2]  # [N, K / 4]
    place = torch.stack((nibble & 3, nibble >> 2), -1).to(torch.int64)
    dense = values.new_zeros(rows, half // 2, 4)
    return dense.scatter_(-1, place, values.reshape(rows, -1, 2)).view(rows, 2 * half)


def matmul_24(x: Tensor, values: Tensor, places: Tensor, bias: Tensor | None) -> Tensor:
    """x · Wᵀ + bias; one block of rows of W is dense at a time."""
    out = x.new_empty(x.shape[0], values.shape[0])
    wide = product_dtype(x)
    rows, added = x.to(wide), None if bias is None else bias.to(wide)
    step = max(MIN_ROWS, CHUNK // max(1, x.shape[1]))
    for start in range(0, values.shape[0], step):
        part = slice(start, start + step)
        weight = unpack(values[part], places[part]).to(wide)
        out[:, part] = torch.nn.functional.linear(rows, weight, None if added is None else added[part])
    return out
