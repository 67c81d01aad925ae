"""LoRA on pruned weights in plain torch: the CPU path of `lean_kernels.ops.sparse_lora` and its oracle.

The effective weight M ⊙ (W + s·B·A) is made for one block of rows at a time and never kept.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from lean_kernels._rt import product_dtype, sum_dtype

CHUNK = 1 << 22  # values of an effective weight that are held at a time
CACHED = 1 << 18  # values masked at a time, while they lie in the processor's cache
MIN_ROWS = 128  # of a block: a narrower product is slow


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
    out = torch.empty(w.shape, dtype=wide, device=w.device)
    for part, keep in _kept(out, mask):
        torch.addmm(*_in(wide, w[part], b[part], a), alpha=scale, out=out[part])
        out[part].view(keep.dtype).mul_(keep)
    return out


def apply_mask_(x: Tensor, mask: Tensor) -> Tensor:
    """Make x [N, K] zero where the mask (bool or bits) is False, in place, whatever was there.

    As integers, x is multiplied by 0 or 1: up to ten times faster on a CPU than with a bool as factor.
    """
    for part, keep in _kept(x, mask):
        x[part].view(keep.dtype).mul_(keep)
    return x


def _kept(x: Tensor, mask: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows of x, and the mask there as integers of x's width; each overwrites the last one's: fresh memory
    costs more than what is written to it."""
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[x.dtype.itemsize]
    room = torch.empty_like(x[: _rows(x, CACHED)], dtype=bits)
    for part in _parts(x, CACHED):
        keep = mask[part] if mask.dtype == torch.bool else unpack_mask(mask[part], x.shape[1])
        yield part, room[: len(keep)].copy_(keep.view(torch.int8))


def sparse_lora_matmul(
    x: Tensor, w: Tensor, a: Tensor, b: Tensor, mask: Tensor, scale: float, bias: Tensor | None
) -> Tensor:
    wide = product_dtype(x)
    (rows,), added = _in(wide, x), None if bias is None else bias.to(wide)
    blocks = _parts(w, CHUNK)
    if len(blocks) == 1:
        return linear(rows, effective_weight(w, a, b, mask, scale), added).to(x.dtype)
    out = x.new_empty(x.shape[0], w.shape[0])
    for part in blocks:
        weight = effective_weight(w[part], a, b[part], mask[part], scale)
        out[:, part] = linear(rows, weight, None if added is None else added[part])
    return out


def sparse_lora_backward(
    grad: Tensor, x: Tensor, w: Tensor, a: Tensor, b: Tensor, mask: Tensor, scale: float, for_x: bool, for_ab: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, a and b (empty where not wanted), from dD = scale · mask ⊙ (gradᵀ · x) of one block of rows."""
    grad, rows, a_wide, b_wide = _in(product_dtype(x), grad, x, a, b)
    x_grad, a_grad, b_grad = x.new_empty(0), a.new_empty(0), b.new_empty(b.shape if for_ab else 0)
    for part in _parts(w, CHUNK):
        weight = None
        if for_x:
            weight = effective_weight(w[part], a, b[part], mask[part], scale)
            x_grad = _added(x_grad, grad[:, part] @ weight)
        if for_ab:  # where the weight was, if it was: fresh memory is slow
            delta = apply_mask_(torch.mm(grad[:, part].T, rows, out=weight), mask[part])
            b_grad[part] = (a_wide @ delta.T).mul_(scale).T  # in this order the product is quick
            a_grad = _added(a_grad, (b_wide[part].T @ delta).mul_(scale))
    x_grad, a_grad = _in(x.dtype, x_grad, a_grad)
    return x_grad, a_grad, b_grad


def straight_through(grad: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Gradients of a and b as if there were no mask: plain LoRA's, without a product of the weight's size."""
    grad, rows, a_wide, b_wide = _in(product_dtype(x), grad, x, a, b)
    a_grad = (grad @ b_wide).mul_(scale).T @ rows
    b_grad = grad.T @ (rows @ a_wide.T).mul_(scale)
    a_grad, b_grad = _in(a.dtype, a_grad, b_grad)
    return a_grad, b_grad


def merge_sparse_lora(w: Tensor, a: Tensor, b: Tensor, mask: Tensor, scale: float) -> Tensor:
    if product_dtype(w) == w.dtype:
        return effective_weight(w, a, b, mask, scale)
    out = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    for part in _parts(w, CHUNK):
        out[part] = effective_weight(w[part], a, b[part], mask[part], scale)
    return out


def _in(dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in that dtype; `to` alone takes 2 us where there is nothing to do."""
    return tuple(t if t.dtype == dtype else t.to(dtype) for t in tensors)


def _added(total: Tensor, term: Tensor) -> Tensor:
    """total + term, in `sum_dtype` from the second term on; an empty total is none."""
    return term if total.numel() == 0 else total.to(sum_dtype(term)).add_(term)


def _rows(w: Tensor, values: int) -> int:
    return max(MIN_ROWS, values // max(1, w.shape[1]))


def _parts(w: Tensor, values: int) -> list[slice]:
    """Blocks of rows of a matrix, of about that many values."""
    step = _rows(w, values)
    return [slice(start, start + step) for start in range(0, w.shape[0], step)]
