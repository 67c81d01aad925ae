"""LoRA on pruned weights in plain torch: the CPU path of `lean_kernels.ops.sparse_lora` and its oracle.

The effective weight M ⊙ (W + s·B·A) is made for one block of rows at a time and never kept.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from lean_kernels._rt import product_dtype, sum_dtype

CHUNK = 1 << 18  # values of an effective weight made at a time
MIN_ROWS = 128  # of such a block: a narrower product is slow


def pack_mask(mask: Tensor) -> Tensor:
    """Bool [N, K] as bits: int32 [N, ceil(K / 32)], column k in bit k % 32 of word k // 32."""
    rows, columns = mask.shape
    padded = pad(mask.to(torch.int64), (0, -columns % 32)).view(rows, -1, 32)
    words = (padded << torch.arange(32, device=mask.device)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack_mask(words: Tensor, columns: int) -> Tensor:
    """The bool mask [N, columns] of int32 words [N, ceil(columns / 32)]."""
    bits = (words[:, :, None] >> torch.arange(32, device=words.device, dtype=torch.int32)) & 1
    return bits.flatten(1)[:, :columns].to(torch.bool)


def effective_weight(w: Tensor, a: Tensor, b: Tensor, mask: Tensor, scale: float) -> Tensor:
    """mask ⊙ (w + scale · b · a) in `product_dtype` of w, for any rows of w, b and mask."""
    wide = product_dtype(w)
    a, out = a.to(wide), torch.empty(w.shape, dtype=wide, device=w.device)
    for part in _parts(w):  # a block is masked while it lies in the processor's cache
        torch.addmm(w[part].to(wide), b[part].to(wide), a, alpha=scale, out=out[part])
        apply_mask_(out[part], mask[part])
    return out


def apply_mask_(x: Tensor, mask: Tensor) -> Tensor:
    """Make x [N, K] zero where the mask (bool or bits) is False, in place, whatever was there.

    As integers, x is multiplied by 0 or 1: up to ten times faster on a CPU than with a bool as factor.
    """
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[x.dtype.itemsize]
    for part in _parts(x):
        keep = mask[part] if mask.dtype == torch.bool else unpack_mask(mask[part], x.shape[1])
        x[part].view(bits).mul_(keep.view(torch.int8).to(bits))
    return x


def sparse_lora_matmul(
    x: Tensor, w: Tensor, a: Tensor, b: Tensor, mask: Tensor, scale: float, bias: Tensor | None
) -> Tensor:
    out = x.new_empty(x.shape[0], w.shape[0])
    wide = product_dtype(x)
    rows, added = x.to(wide), None if bias is None else bias.to(wide)
    for part, weight in _blocks(w, a, b, mask, scale):
        out[:, part] = linear(rows, weight, None if added is None else added[part])
    return out


def sparse_lora_backward(
    grad: Tensor, x: Tensor, w: Tensor, a: Tensor, b: Tensor, mask: Tensor, scale: float, for_x: bool, for_ab: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, a and b (empty where not wanted), from dD = scale · mask ⊙ (gradᵀ · x) of one block of rows."""
    wide = product_dtype(x)
    grad, rows, a_wide, b_wide = grad.to(wide), x.to(wide), a.to(wide), b.to(wide)
    x_grad = torch.zeros(x.shape if for_x else (0,), dtype=sum_dtype(x), device=x.device)
    a_grad = torch.zeros(a.shape if for_ab else (0,), dtype=sum_dtype(x), device=x.device)
    b_grad = b.new_empty(b.shape if for_ab else (0,))
    for part in _parts(w):
        if for_x:
            x_grad += grad[:, part] @ effective_weight(w[part], a, b[part], mask[part], scale)
        if for_ab:
            delta = apply_mask_(grad[:, part].T @ rows, mask[part])
            b_grad[part] = (delta @ a_wide.T).mul_(scale)
            a_grad.add_(b_wide[part].T @ delta, alpha=scale)
    return x_grad.to(x.dtype), a_grad.to(a.dtype), b_grad


def merge_sparse_lora(w: Tensor, a: Tensor, b: Tensor, mask: Tensor, scale: float) -> Tensor:
    if product_dtype(w) == w.dtype:
        return effective_weight(w, a, b, mask, scale)
    out = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    for part, weight in _blocks(w, a, b, mask, scale):
        out[part] = weight
    return out


def _blocks(w: Tensor, a: Tensor, b: Tensor, mask: Tensor, scale: float) -> Iterator[tuple[slice, Tensor]]:
    for part in _parts(w):
        yield part, effective_weight(w[part], a, b[part], mask[part], scale)


def _parts(w: Tensor) -> list[slice]:
    """Blocks of rows of a matrix."""
    step = max(MIN_ROWS, CHUNK // max(1, w.shape[1]))
    return [slice(start, start + step) for start in range(0, w.shape[0], step)]
