"""Products with merged experts in plain torch: the CPU path of `lean_kernels.ops.meo` and its oracle.

On a CPU, groups with the same experts and gates are merged once. Experts are merged block by block in cache, in float32
for half precision, and rounded once. Where a group has few rows, summing the experts' outputs moves less: the map is
linear, so both orders give the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lean_kernels._rt import product_dtype, sum_dtype

CHUNK = 1 << 17  # values merged at a time


def merged_matmul(x: Tensor, w: Tensor, idx: Tensor, g: Tensor, shift: Tensor | None) -> Tensor:
    batch, length, _ = x.shape
    out = x.new_empty(batch, length, w.shape[2])
    wide, merged = product_dtype(x), None
    for members, experts, gates in _distinct_groups(idx, g):
        rows = x[members].flatten(0, 1).to(wide)
        if _outputs_are_faster(len(rows), len(experts), x.dtype):
            product = _sum_of_outputs(rows, w, experts, gates)
        else:
            merged = merge_experts(w, experts, gates, out=merged)
            product = rows @ merged
        out[members] = product.view(len(members), length, -1).to(out.dtype)
    return out if shift is None else out.add_(shift[:, None])


def merge_experts(w: Tensor, experts: list[int], gates: list[float], out: Tensor | None = None) -> Tensor:
    """Σ gates[j] · w[experts[j]], [K, N] in `product_dtype` of w, written to `out` if there is one."""
    if out is None:
        out = torch.empty(w.shape[1:], dtype=product_dtype(w), device=w.device)
    step = max(1, CHUNK // max(1, w.shape[2]))
    for start in range(0, w.shape[1], step):
        part = slice(start, start + step)
        total = torch.empty_like(out[part], dtype=sum_dtype(w)) if out.dtype.itemsize == 2 else out[part]
        torch.mul(w[experts[0], part].to(total.dtype), gates[0], out=total)
        for expert, gate in zip(experts[1:], gates[1:]):
            total.add_(w[expert, part], alpha=gate)
        if total.dtype != out.dtype:
            out[part] = total
    return out


def merged_matmul_backward(
    x: Tensor, w: Tensor, idx: Tensor, g: Tensor, grad: Tensor, for_w: bool, for_g: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of w and g (empty where not wanted) from dŴ = xᵀ · grad of one group at a time."""
    wide = sum_dtype(w)
    w_grad = torch.zeros(w.shape if for_w else (0,), dtype=wide, device=w.device)
    g_grad = torch.zeros(g.shape if for_g else (0,), dtype=wide, device=w.device)
    gates, narrow = g.tolist(), product_dtype(x)
    for b, experts in enumerate(idx.tolist()):
        merged_grad = (x[b].to(narrow).T @ grad[b].to(narrow)).to(wide)  # dŴ, [K, N]
        for j, expert in enumerate(experts):
            if for_w:
                w_grad[expert].add_(merged_grad, alpha=gates[b][j])
            if for_g:
                g_grad[b, j] = _inner(merged_grad, w[expert])
    return w_grad.to(w.dtype), g_grad.to(g.dtype)


def _sum_of_outputs(rows: Tensor, w: Tensor, experts: list[int], gates: list[float]) -> Tensor:
    total = torch.zeros(len(rows), w.shape[2], dtype=sum_dtype(w), device=w.device)
    for expert, gate in zip(experts, gates):
        total.add_(rows @ w[expert].to(rows.dtype), alpha=gate)
    return total


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Sum of a · b over blocks of rows, in the dtype of a."""
    step = max(1, CHUNK // max(1, a.shape[1]))
    parts = [(x * y).sum() for x, y in zip(a.split(step), b.split(step))]
    return torch.stack(parts).sum()


def _outputs_are_faster(rows: int, experts: int, dtype: torch.dtype) -> bool:
    """Measured on a CPU: with one row; in bfloat16, slow to merge and fast to multiply, with more of them."""
    return rows == 1 or (dtype == torch.bfloat16 and rows * (experts - 1) <= 64)


def _distinct_groups(idx: Tensor, g: Tensor) -> list[tuple[list[int], list[int], list[float]]]:
    """(groups, their experts, their gates), one entry for all groups that are merged alike."""
    found: dict[tuple[tuple[int, ...], tuple[float, ...]], list[int]] = {}
    for b, (experts, gates) in enumerate(zip(idx.tolist(), g.tolist())):
        found.setdefault((tuple(experts), tuple(gates)), []).append(b)
    return [(members, list(experts), list(gates)) for (experts, gates), members in found.items()]
