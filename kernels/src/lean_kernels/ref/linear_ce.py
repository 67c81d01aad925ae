"""Per-token cross-entropy of a linear head in plain torch: one tile of logits at a time, in float32 or float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

TILE_BYTES = 4 << 20  # a tile of logits, and as much for its softmax: what stays in a processor's caches
GRADIENT_BYTES = 64 << 20  # whole rows of logits, which gradients need
MAX_ROWS = 2048  # of a tile: the weight is read once for so many rows
CONVERTED = 4 << 20  # values of the weight that are converted to float32 at a time


class Parts(NamedTuple):
    """Sums over parts of the vocabulary, [parts, T] each; [0, T] for what is not asked."""

    top: Tensor  # the greatest logit
    sums: Tensor  # of exp(logit - top)
    moments: Tensor  # sum of exp(logit - top) * (logit - top)
    ranks: Tensor  # how many logits are greater than the target's
    bests: Tensor  # the token of the greatest logit


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
    """loss, lse, target_logit, entropy, rank, argmax, as `lean_kernels.linear_ce` gives them; [0] if not asked.

    h [T, H], weight [V, H], target [T], bias [V]. Ignored rows cost nothing.
    """
    dtype, device, total = accumulator(h.dtype), h.device, len(h)
    real = [torch.zeros(total if asked else 0, dtype=dtype, device=device) for asked in (True, True, True, entropy)]
    whole = [torch.zeros(total if asked else 0, dtype=torch.int64, device=device) for asked in (rank, argmax)]
    results = (*real, *whole)
    for rows in _counted(target, ignore_index, MAX_ROWS):
        local = target[rows] - vocab_start
        head = Head(weight, bias, softcap, logit_scale)
        part = h[rows].to(dtype)
        own = head.own_logits(part, local)
        found = [
            _sums(logits, own, local - at, at, entropy, rank, argmax)
            for at, logits in head.tiles(part, max(1, TILE_BYTES // (len(rows) * dtype.itemsize)))
        ]
        stacked = (torch.stack(parts) if len(parts[0]) else parts[0][None, :0] for parts in zip(*found))
        for result, value in zip(results, merge_parts(Parts(*stacked), own)):
            if len(result):
                result[rows] = value
    return results


def merge_parts(parts: Parts, own: Tensor) -> tuple[Tensor, ...]:
    """loss, lse, target_logit, entropy, rank and argmax [T] of the whole vocabulary; `own` are the targets' logits."""
    largest = parts.top.amax(0)
    shares = (parts.top - largest).exp()
    total = (parts.sums * shares).sum(0)
    log_sum = total.log()
    # relative to the greatest logit: a difference of two large numbers would lose digits
    loss = largest - own + log_sum
    empty = own.new_empty(0)
    spread, rank, best = empty, empty.long(), empty.long()
    if parts.moments.numel():
        spread = log_sum - (shares * (parts.moments + parts.sums * (parts.top - largest))).sum(0) / total
    if parts.ranks.numel():
        rank = parts.ranks.sum(0)
    if parts.bests.numel():
        best = parts.bests.gather(0, parts.top.argmax(0)[None])[0].long()
    return loss, largest + log_sum, own, spread, rank, best


class Head(NamedTuple):
    """The map from hidden states to logits."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float

    def tiles(self, h: Tensor, columns: int) -> Iterator[tuple[int, Tensor]]:
        """Where a run of the vocabulary begins, and its logits [rows, <= columns], which may be changed."""
        if self.weight.dtype != h.dtype:
            columns = max(1, min(columns, CONVERTED // h.shape[1]))
        room = torch.empty(len(h) * min(columns, len(self.weight)), dtype=h.dtype, device=h.device)
        for at in range(0, len(self.weight), columns):
            slab = self.weight[at : at + columns].to(h.dtype)
            logits = room[: len(h) * len(slab)].view(len(h), len(slab))
            torch.mm(h, slab.T, out=logits)
            yield at, self._finish(logits, None if self.bias is None else self.bias[at : at + columns])

    def own_logits(self, h: Tensor, token: Tensor) -> Tensor:
        """The logit of one token a row, [rows]; -inf for a token that the weight does not hold."""
        held = (token >= 0) & (token < len(self.weight))
        token = token.clamp(0, len(self.weight) - 1)
        logits = torch.linalg.vecdot(h, self.weight[token].to(h.dtype))
        return self._finish(logits, None if self.bias is None else self.bias[token]).where(held, -torch.inf)

    def _finish(self, logits: Tensor, bias: Tensor | None) -> Tensor:
        if bias is not None:
            logits += bias.to(logits.dtype)
        if self.scale != 1:
            logits *= self.scale
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits


def _counted(target: Tensor, ignore_index: int, size: int) -> tuple[Tensor, ...]:
    """The numbers of the rows that count, at most `size` at a time."""
    rows = (target != ignore_index).nonzero()[:, 0]
    return rows.split(size) if len(rows) else ()


def _sums(
    logits: Tensor, own: Tensor, local: Tensor, at: int, entropy: bool, rank: bool, argmax: bool
) -> tuple[Tensor, ...]:
    """The fields of `Parts` for one tile [rows, columns], which is changed; `local` are the targets' columns."""
    top = logits.amax(-1)
    empty = top.new_empty(0)
    moments, ranks, bests = empty, empty.long(), empty.long()
    if argmax:
        bests = logits.argmax(-1) + at
    if rank:
        # the target's own logit, summed in another order here, may seem greater than itself
        held = (local >= 0) & (local < logits.shape[1])
        again = logits.gather(1, local.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
        above = (logits > own[:, None]).to(logits.dtype).sum(-1)  # a sum of numbers is quicker than one of flags
        ranks = above.long() - (held & (again > own)).long()
    shares = logits.softmax(-1)
    sums = shares.amax(-1).reciprocal()  # the greatest share is exp(0) / sum
    if entropy:
        # a logit of -inf has the share 0, and 0 times -inf is no number
        relative = logits.sub_(top[:, None]).clamp_(min=torch.finfo(logits.dtype).min)
        moments = torch.linalg.vecdot(shares, relative) * sums
    return top, sums, moments, ranks, bests


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
    head = Head(weight, bias, softcap, logit_scale)
    size = max(1, min(MAX_ROWS, GRADIENT_BYTES // (len(weight) * dtype.itemsize)))
    for rows in _counted(target, ignore_index, size):
        logits = torch.cat([tile.clone() for _, tile in head.tiles(h[rows].to(dtype), len(weight))], 1)
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


def _product(dz: Tensor, weight: Tensor) -> Tensor:
    """dz [n, V] times weight [V, H], summed in dz's type."""
    if weight.dtype == dz.dtype:
        return dz @ weight
    result = torch.zeros(len(dz), weight.shape[1], dtype=dz.dtype, device=dz.device)
    size = max(1, CONVERTED // weight.shape[1])
    for at in range(0, len(weight), size):
        result.addmm_(dz[:, at : at + size], weight[at : at + size].to(dz.dtype))
    return result
