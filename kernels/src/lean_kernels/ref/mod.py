"""Token gather and scatter in plain torch: the CPU path of `lean_kernels.ops.mod` and its oracle.

Rows are copied whole, sequence by sequence, so inputs may have any strides. Positions from `counts[b]` on are padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lean_kernels._rt import sum_dtype

CHUNK = 1 << 18  # values worked on at a time where a temporary is needed: it then stays in a core's cache


def token_gather(x: Tensor, idx: Tensor, counts: Tensor | None, norm_weight: Tensor | None, eps: float) -> Tensor:
    out = _empty(x, idx.shape, x.shape[2], counts)
    for sequence, indices, rows in _sequences(idx, counts, out):
        torch.index_select(x[sequence], 0, indices, out=rows)
        if norm_weight is not None:
            for part in rows.split(_rows_of_a_chunk(rows)):
                part.copy_(rms_norm(part, norm_weight, eps))
    return out


def rms_norm(rows: Tensor, weight: Tensor, eps: float) -> Tensor:
    """rows / RMS(rows) · weight, in float32 for half precision (not rounded in between)."""
    wide = rows.to(sum_dtype(rows))
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)


def token_scatter_add_(x: Tensor, y: Tensor, idx: Tensor, gate: Tensor | None, counts: Tensor | None) -> None:
    for sequence, indices, rows in _sequences(idx, counts, y):
        target = x[sequence]
        if gate is None:
            target.index_add_(0, indices, rows)
            continue
        scale = gate[sequence, : len(rows), None]
        step = _rows_of_a_chunk(rows)
        for part, at, by in zip(rows.split(step), indices.split(step), scale.split(step), strict=True):
            target.index_add_(0, at, (part * by).to(x.dtype))


def token_scatter_add(x: Tensor, y: Tensor, idx: Tensor, gate: Tensor | None, counts: Tensor | None) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    token_scatter_add_(out, y, idx, gate, counts)
    return out


def token_scatter(y: Tensor, idx: Tensor, counts: Tensor | None, tokens: int) -> Tensor:
    out = y.new_zeros(y.shape[0], tokens, y.shape[2])
    for sequence, indices, rows in _sequences(idx, counts, y):
        out[sequence].index_copy_(0, indices.long(), rows)
    return out


def token_scatter_add_backward(
    grad: Tensor, y: Tensor, idx: Tensor, gate: Tensor, counts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of y and gate: gate · grad[idx], and the sum over H of grad[idx] · y."""
    y_grad = _empty(y, idx.shape, y.shape[2], counts)
    gate_grad = torch.zeros(gate.shape, dtype=gate.dtype, device=y.device)
    for sequence, indices, rows in _sequences(idx, counts, y_grad):
        step = _rows_of_a_chunk(rows)
        for start in range(0, len(rows), step):
            part = slice(start, min(start + step, len(rows)))
            wide = grad[sequence].index_select(0, indices[part]).to(sum_dtype(y))
            gate_grad[sequence, part] = (wide * y[sequence, part]).sum(-1).to(gate.dtype)
            rows[part] = wide * gate[sequence, part, None]
    return y_grad, gate_grad


def _sequences(idx: Tensor, counts: Tensor | None, rows: Tensor) -> list[tuple[int, Tensor, Tensor]]:
    """Number, indices and rows of every sequence, without its padding."""
    if counts is None:
        return [(b, idx[b], rows[b]) for b in range(len(idx))]
    ends = counts.tolist()
    return [(b, idx[b, :end], rows[b, :end]) for b, end in enumerate(ends)]


def _empty(like: Tensor, shape: torch.Size, hidden: int, counts: Tensor | None) -> Tensor:
    """[B, k, H] to be filled; where there is padding, of zeros."""
    size = (*shape, hidden)
    return like.new_empty(size) if counts is None else like.new_zeros(size)


def _rows_of_a_chunk(rows: Tensor) -> int:
    return max(1, CHUNK // max(1, rows.shape[-1]))
