"""Routing of tokens or sequences: choose some, gather their rows, put what a layer makes of them back.

Token mode is mixture-of-depths: `route(scores[B, S], capacity=k)`. Sequence mode, where a layer is skipped for whole
sequences (MindSkip), is the same on one "sequence" of B rows: `route(scores[None], threshold=0.5)` and x as
[1, B, S · H]. A skipped token leaves no key and value in the layer, so position ids and the attention mask must be
gathered with the same indices.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lean_kernels import _rt
from lean_kernels.ref import mod as ref


class Routing(NamedTuple):
    """Chosen rows.

    Args:
        idx: [B, k] int64, no index twice: in each row `counts[b]` chosen ones, ascending, then others as padding.
        gate: [B, k], the scores at `idx`, 0 at padding; carries the gradient to the scores.
        counts: [B] int64.
    """

    idx: Tensor
    gate: Tensor
    counts: Tensor


def route(scores: Tensor, capacity: int | None = None, threshold: float | None = None) -> Routing:
    """Choose per row of `scores` [B, S] the `capacity` highest, those of at least `threshold`, or those that are both.

    Equal scores go by the lower index; NaN is never chosen. With a threshold alone k is S, whatever the scores are, so
    that no shape depends on data: slice to `counts.max()` where a synchronisation does not matter. Plain torch on every
    device: the scores are far smaller than the rows they route.

    Raises:
        ValueError: neither limit given, scores of another shape, a capacity outside 0..S.
    """
    if scores.dim() != 2:
        raise ValueError(f"scores is {list(scores.shape)}; [B, S] is needed")
    if capacity is None and threshold is None:
        raise ValueError("neither capacity nor threshold was given; give one of them, or both")
    tokens = scores.shape[1]
    k = tokens if capacity is None else capacity
    if not 0 <= k <= tokens:
        raise ValueError(f"capacity is {k}, but there are {tokens} tokens in a row; give 0 to {tokens}")
    keep = ~scores.isnan()
    if threshold is not None:
        keep = keep & (scores >= threshold)
    if k < tokens:
        order = scores.detach().masked_fill(~keep, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
        keep = keep & torch.zeros_like(keep).scatter_(1, order[:, :k], True)
    # a stable sort puts the chosen first, in order
    idx = (~keep).to(torch.uint8).sort(dim=-1, stable=True).indices[:, :k]
    chosen = keep.gather(1, idx)
    return Routing(idx, torch.where(chosen, scores.gather(1, idx), 0), keep.sum(-1))


def token_gather(
    x: Tensor,
    idx: Tensor,
    *,
    counts: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """Rows x[b, idx[b, j]], [B, k, H]; normalised by RMSNorm on the way if its weight is given.

    Differentiable in x and norm_weight.

    Args:
        x: [B, S, H].
        idx: [B, k] int32 or int64, no index twice in a row.
        counts: [B], how many of a row's indices count; rows after them are 0. All without it.
        norm_weight: [H], of the RMSNorm (with `eps`) to apply to the gathered rows.

    Raises:
        ValueError: shapes that do not match, k > S, an index twice or outside 0..S-1 (values are looked at on a CPU,
            and on a GPU with LEAN_KERNELS_DEBUG=1).
        TypeError: indices that are not int32 or int64.
    """
    _check(x, idx, counts, norm_weight=norm_weight)
    if norm_weight is not None and norm_weight.shape != x.shape[2:]:
        raise ValueError(f"norm_weight is {list(norm_weight.shape)}; for x {list(x.shape)} it must be [{x.shape[2]}]")
    out: Tensor = _token_gather(x, idx, counts, norm_weight, eps, backend)
    return out


def token_scatter_add(
    x: Tensor,
    y: Tensor,
    idx: Tensor,
    gate: Tensor | None = None,
    *,
    counts: Tensor | None = None,
    inplace: bool = False,
    backend: str = "auto",
) -> Tensor:
    """x with gate[b, j] · y[b, j] added to row idx[b, j]: the residual addition of a routed layer.

    Differentiable in x, y and gate, unless in place.

    Args:
        x: [B, S, H].
        y: [B, k, H], of the dtype of x.
        idx, counts: as in `token_gather`.
        gate: [B, k] of any floating dtype; 1 without it.
        inplace: change x and return it; for inference, where it moves 3·k·H values rather than about 2·S·H.

    Raises:
        ValueError, TypeError: as `token_gather`.
        RuntimeError: in place while gradients are recorded.
    """
    _check(x, idx, counts, y=y, gate=gate)
    if y.shape != (*idx.shape, x.shape[2]):
        raise ValueError(f"y is {list(y.shape)}; for idx {list(idx.shape)} it must be {[*idx.shape, x.shape[2]]}")
    if y.dtype != x.dtype:
        raise TypeError(f"y is {y.dtype} and x is {x.dtype}; convert one of them")
    if gate is not None and gate.shape != idx.shape:
        raise ValueError(f"gate is {list(gate.shape)}; it must have the shape of idx, {list(idx.shape)}")
    if idx.shape[1] == 0:
        return x
    if not inplace:
        out: Tensor = _token_scatter_add(x, y, idx, gate, counts, backend)
        return out
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, y, gate)):
        raise RuntimeError("in place there is no gradient: call it under torch.no_grad(), or with inplace=False")
    _token_scatter_add_inplace(x, y, idx, gate, counts, backend)
    return x


def _check(x: Tensor, idx: Tensor, counts: Tensor | None, **others: Tensor | None) -> None:
    if x.dim() != 3:
        raise ValueError(f"x is {list(x.shape)}; [B, S, H] is needed")
    if idx.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"idx is {idx.dtype}; indices are int32 or int64")
    if idx.dim() != 2 or idx.shape[0] != x.shape[0]:
        raise ValueError(f"idx is {list(idx.shape)}; for x {list(x.shape)} it must be [{x.shape[0]}, k]")
    if idx.shape[1] > x.shape[1]:
        raise ValueError(f"idx chooses {idx.shape[1]} of {x.shape[1]} tokens; it cannot choose more than there are")
    if counts is not None and counts.shape != idx.shape[:1]:
        raise ValueError(f"counts is {list(counts.shape)}; it must be [{idx.shape[0]}]")
    _rt.same_device(x=x, idx=idx, counts=counts, **others)


def _check_values(idx: Tensor, counts: Tensor | None, tokens: int) -> None:
    """Inside the operators, so that a compiled graph has no branch on data."""
    if not _rt.checks_indices(idx) or idx.numel() == 0:
        return
    k = idx.shape[1]
    wide, bad = idx.long(), (idx < 0) | (idx >= tokens)
    if counts is not None:
        if bool(((counts < 0) | (counts > k)).any()):
            raise ValueError(f"counts {counts.tolist()} must be 0 to {k}, the number of indices in a row")
        position = torch.arange(k, device=idx.device)
        padding = position >= counts[:, None]
        wide = torch.where(padding, tokens + position, wide)  # all different, and beyond all tokens
        bad &= ~padding
    if bool(bad.any()):
        raise ValueError(f"index {int(idx[bad][0])} is outside 0..{tokens - 1}")
    if bool((wide.diff(dim=1) > 0).all()):
        return
    ordered = wide.sort(dim=1).values
    twice = ordered[:, 1:] == ordered[:, :-1]
    if bool(twice.any()):
        raise ValueError(f"duplicate index {int(ordered[:, 1:][twice][0])} in idx; choose each token once")


def _run(backend: str, x: Tensor) -> ModuleType:
    return _rt.kernels("mod") if _rt.choose(backend, x) == "triton" else ref


@torch.library.custom_op("lean_kernels::token_gather", mutates_args=())
def _token_gather(
    x: Tensor, idx: Tensor, counts: Tensor | None, norm_weight: Tensor | None, eps: float, backend: str
) -> Tensor:
    _check_values(idx, counts, x.shape[1])
    out: Tensor = _run(backend, x).token_gather(x, idx, counts, norm_weight, eps)
    return out


@_token_gather.register_fake
def _(x: Tensor, idx: Tensor, counts: Tensor | None, norm_weight: Tensor | None, eps: float, backend: str) -> Tensor:
    return x.new_empty(idx.shape[0], idx.shape[1], x.shape[2])


def _gather_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, idx, counts, norm_weight, ctx.eps, ctx.backend = inputs
    ctx.tokens = x.shape[1]
    ctx.save_for_backward(idx, counts, *((x, norm_weight) if norm_weight is not None else (None, None)))


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    idx, counts, x, weight = ctx.saved_tensors
    weight_grad = None
    if weight is not None:
        wide = torch.promote_types(x.dtype, torch.float32)
        rows = _token_gather(x, idx, counts, None, ctx.eps, ctx.backend).to(wide)  # padded rows are 0: no gradient
        scale = torch.rsqrt(rows.square().mean(-1, keepdim=True) + ctx.eps)
        unit, down = rows * scale, grad.to(wide)
        weight_grad = (down * unit).sum((0, 1)).to(weight.dtype)
        down = down * weight.to(wide)
        grad = ((down - unit * (down * unit).mean(-1, keepdim=True)) * scale).to(x.dtype)
    x_grad = _token_scatter(grad, idx, counts, ctx.tokens, ctx.backend) if ctx.needs_input_grad[0] else None
    return x_grad, None, None, weight_grad, None, None


_token_gather.register_autograd(_gather_backward, setup_context=_gather_context)


@torch.library.custom_op("lean_kernels::token_scatter", mutates_args=())
def _token_scatter(y: Tensor, idx: Tensor, counts: Tensor | None, tokens: int, backend: str) -> Tensor:
    """Rows y[b, j] at idx[b, j] of zeros [B, tokens, H]: the backward of the gather."""
    out: Tensor = _run(backend, y).token_scatter(y, idx, counts, tokens)
    return out


@_token_scatter.register_fake
def _(y: Tensor, idx: Tensor, counts: Tensor | None, tokens: int, backend: str) -> Tensor:
    return y.new_empty(y.shape[0], tokens, y.shape[2])


@torch.library.custom_op("lean_kernels::token_scatter_add", mutates_args=())
def _token_scatter_add(
    x: Tensor, y: Tensor, idx: Tensor, gate: Tensor | None, counts: Tensor | None, backend: str
) -> Tensor:
    _check_values(idx, counts, x.shape[1])
    out: Tensor = _run(backend, x).token_scatter_add(x, y, idx, gate, counts)
    return out


@_token_scatter_add.register_fake
def _(x: Tensor, y: Tensor, idx: Tensor, gate: Tensor | None, counts: Tensor | None, backend: str) -> Tensor:
    return x.new_empty(x.shape)


def _scatter_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, y, idx, gate, counts, ctx.backend = inputs
    ctx.save_for_backward(None if gate is None else y, idx, gate, counts)


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    y, idx, gate, counts = ctx.saved_tensors
    if gate is None:
        y_grad = _token_gather(grad, idx, counts, None, 0.0, ctx.backend) if ctx.needs_input_grad[1] else None
        return grad, y_grad, None, None, None, None
    y_grad, gate_grad = _token_scatter_add_backward(grad, y, idx, gate, counts, ctx.backend)
    return grad, y_grad, None, gate_grad, None, None


_token_scatter_add.register_autograd(_scatter_backward, setup_context=_scatter_context)


@torch.library.custom_op("lean_kernels::token_scatter_add_backward", mutates_args=())
def _token_scatter_add_backward(
    grad: Tensor, y: Tensor, idx: Tensor, gate: Tensor, counts: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    y_grad, gate_grad = _run(backend, y).token_scatter_add_backward(grad, y, idx, gate, counts)
    return y_grad, gate_grad


@_token_scatter_add_backward.register_fake
def _(grad: Tensor, y: Tensor, idx: Tensor, gate: Tensor, counts: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), gate.new_empty(gate.shape)


@torch.library.custom_op("lean_kernels::token_scatter_add_", mutates_args=("x",))
def _token_scatter_add_inplace(
    x: Tensor, y: Tensor, idx: Tensor, gate: Tensor | None, counts: Tensor | None, backend: str
) -> None:
    _check_values(idx, counts, x.shape[1])
    _run(backend, x).token_scatter_add_(x, y, idx, gate, counts)


@_token_scatter_add_inplace.register_fake
def _(x: Tensor, y: Tensor, idx: Tensor, gate: Tensor | None, counts: Tensor | None, backend: str) -> None:
    return None
