"""Per-token cross-entropy of a linear head in plain torch: the logits of a few rows at a time, in float32 or float64."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

LOGIT_BYTES = 64 << 20  # the logits that are held at one time
MAX_ROWS = 4096
CONVERTED = 4 << 20  # values of the head's weight that are converted to float32 at a time


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type of logits and results: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def linear_ce(
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    *,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    vocab_start: int,
    entropy: bool,
    rank: bool,
    argmax: bool,
) -> tuple[Tensor, ...]:
    """loss, lse, target_logit, entropy, rank, argmax, as `lean_kernels.linear_ce` gives them; [0] for what is not asked.

    h [T, H], weight [V, H], target [T], bias [V].
    """
    dtype, device, total = accumulator(h.dtype), h.device, len(h)
    loss, lse, at_target = (torch.zeros(total, dtype=dtype, device=device) for _ in range(3))
    spread = torch.zeros(total if entropy else 0, dtype=dtype, device=device)
    place, best = (torch.zeros(total if asked else 0, dtype=torch.int64, device=device) for asked in (rank, argmax))
    for rows, logits in _chunks(h, weight, target, bias, ignore_index, softcap, logit_scale):
        of_target, held = _target_logits(logits, target[rows], vocab_start)
        if argmax:
            best[rows] = logits.argmax(-1)
        if rank:
            place[rows] = (logits > of_target[:, None]).sum(-1)
        # relative to the greatest logit: a difference of two large numbers would lose digits
        largest = logits.amax(-1)
        relative = logits.sub_(largest[:, None])
        log_sum = relative.logsumexp(-1)
        lse[rows] = largest + log_sum
        at_target[rows] = of_target
        loss[rows] = torch.where(held, largest - of_target + log_sum, torch.inf)
        if entropy:
            shares = relative.sub_(log_sum[:, None]).exp_()
            spread[rows] = torch.special.entr(shares).sum(-1)
    return loss, lse, at_target, spread, place, best


def linear_ce_backward(
    grads: tuple[Tensor, Tensor, Tensor, Tensor],
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    *,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    vocab_start: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for h, weight and bias, [0] for no bias: the logits are formed again, sums are in float32.

    `grads` are those of loss, lse, target_logit and entropy, [T] each, [0] for an entropy that was not asked.
    """
    dtype = accumulator(h.dtype)
    of_loss, of_lse, of_target, of_entropy = grads
    dh = torch.zeros(h.shape, dtype=h.dtype, device=h.device)
    dw = torch.zeros(weight.shape, dtype=dtype, device=h.device)
    db = torch.zeros(0 if bias is None else len(bias), dtype=dtype, device=h.device)
    for rows, logits in _chunks(h, weight, target, bias, ignore_index, softcap, logit_scale):
        logs = logits.log_softmax(-1)
        shares = logs.exp()
        dz = shares * (of_loss[rows] + of_lse[rows])[:, None]
        if len(of_entropy):
            spread = torch.special.entr(shares).sum(-1, keepdim=True)
            # where a share is 0 its logarithm may be -inf
            dz -= of_entropy[rows][:, None] * torch.where(shares == 0, 0.0, shares * (logs + spread))
        local = target[rows] - vocab_start
        held = (local >= 0) & (local < len(weight))
        change = torch.where(held, of_target[rows] - of_loss[rows], 0.0)
        dz.scatter_add_(1, local.clamp(0, len(weight) - 1)[:, None], change[:, None])
        if softcap is not None:
            dz *= 1 - (logits / softcap).square()
        if bias is not None:
            db += dz.sum(0) * logit_scale
        dz *= logit_scale
        dh[rows] = _product(dz, weight).to(h.dtype)
        dw.addmm_(dz.T, h[rows].to(dtype))
    return dh, dw.to(weight.dtype), db if bias is None else db.to(bias.dtype)


def _chunks(
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Numbers of rows that count, and their logits [rows, V], which may be changed. Ignored rows cost nothing."""
    dtype = accumulator(h.dtype)
    counted = (target != ignore_index).nonzero()[:, 0]
    size = max(1, min(MAX_ROWS, LOGIT_BYTES // (len(weight) * dtype.itemsize), len(counted)))
    room = torch.empty(size, len(weight), dtype=dtype, device=h.device)
    for rows in counted.split(size) if len(counted) else ():
        logits = room[: len(rows)]
        part = h[rows].to(dtype)
        for at, slab in _slabs(weight, dtype):
            torch.mm(part, slab.T, out=logits[:, at : at + len(slab)])
        if bias is not None:
            logits += bias.to(dtype)
        if logit_scale != 1:
            logits *= logit_scale
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        yield rows, logits


def _slabs(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Where a run of the weight's rows begins, and the run in this dtype: the whole, if nothing is to convert."""
    if weight.dtype == dtype:
        yield 0, weight
        return
    size = max(1, CONVERTED // weight.shape[1])
    for at in range(0, len(weight), size):
        yield at, weight[at : at + size].to(dtype)


def _product(dz: Tensor, weight: Tensor) -> Tensor:
    """dz [n, V] times weight [V, H], summed in dz's type."""
    result = torch.zeros(len(dz), weight.shape[1], dtype=dz.dtype, device=dz.device)
    for at, slab in _slabs(weight, dz.dtype):
        result.addmm_(dz[:, at : at + len(slab)], slab)
    return result


def _target_logits(logits: Tensor, target: Tensor, vocab_start: int) -> tuple[Tensor, Tensor]:
    """Each row's logit of its target, -inf where another shard holds it, and whether this one does."""
    local = target - vocab_start
    held = (local >= 0) & (local < logits.shape[1])
    found = logits.gather(1, local.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    return torch.where(held, found, -torch.inf), held
