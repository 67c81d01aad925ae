"""Product with merged experts: each group of rows has one weight matrix, a gated sum of a few experts' (MEO).

y_b = x_b · Σ_j g_bj W[idx_bj] + Σ_j g_bj bias[idx_bj]. A group is a task, a sequence, or a token (L = 1). For a linear
map the mixture of the experts' outputs is the same; with an activation between two such products, merging is MEO's own
definition, so merge, then apply.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lean_kernels import _rt
from lean_kernels.ref import meo as ref

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


def merged_matmul(
    x: Tensor,
    w: Tensor,
    idx: Tensor,
    g: Tensor,
    bias: Tensor | None = None,
    act: str | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """act(x_b · Σ_j g_bj w[idx_bj] + Σ_j g_bj bias[idx_bj]), [Bg, L, N]. Differentiable in x, w, g and bias.

    Groups that share experts and gates are merged once: on a CPU wherever the values are equal; on every device where
    idx and g are expanded from one group (`idx.expand(Bg, -1)`), which costs no look at the values.

    Args:
        x: [Bg, L, K].
        w: experts' weights, [E, K, N], of the dtype of x; any strides, so [E, N, K].mT too.
        idx: experts of each group, [Bg, e] int32 or int64; one named twice counts twice.
        g: their gates, [Bg, e], any floating dtype. NaN propagates.
        bias: [E, N].
        act: "relu", "gelu" or "silu".

    Raises:
        ValueError: shapes that do not match, an unknown activation.
        TypeError: a dtype that is not accepted.
        IndexError: an expert outside 0..E-1 (looked at on a CPU, on a GPU with LEAN_KERNELS_DEBUG=1).
    """
    _check(x, w, idx, g, bias, act)
    batch, length, depth = x.shape
    shared = batch > 1 and idx.stride(0) == 0 and g.stride(0) == 0
    if shared:  # one group that has all rows
        x, idx, g = x.reshape(1, batch * length, depth), idx[:1], g[:1]
    shift = None
    if bias is not None:
        _check_values(idx, w.shape[0])
        shift = (g[..., None].to(bias.dtype) * bias[idx]).sum(1)  # [Bg, N]
    out: Tensor = _merged_matmul(x, w, idx, g, shift, backend)
    if shared:
        out = out.view(batch, length, -1)
    return out if act is None else ACTIVATIONS[act](out)


def _check(x: Tensor, w: Tensor, idx: Tensor, g: Tensor, bias: Tensor | None, act: str | None) -> None:
    if x.dim() != 3 or w.dim() != 3 or x.shape[2] != w.shape[1]:
        raise ValueError(f"x is {list(x.shape)} and w is {list(w.shape)}; [Bg, L, K] and [E, K, N] are needed")
    if x.dtype != w.dtype or not x.is_floating_point():
        raise TypeError(f"x is {x.dtype} and w is {w.dtype}; they must have one floating dtype")
    if idx.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"idx is {idx.dtype}; indices are int32 or int64")
    if idx.dim() != 2 or idx.shape[0] != x.shape[0] or idx.shape[1] == 0:
        raise ValueError(f"idx is {list(idx.shape)}; for x {list(x.shape)} it must be [{x.shape[0]}, e] with e >= 1")
    if g.shape != idx.shape:
        raise ValueError(f"g is {list(g.shape)}; it must have the shape of idx, {list(idx.shape)}")
    if not g.is_floating_point():
        raise TypeError(f"g is {g.dtype}; gates have a floating dtype")
    if bias is not None and bias.shape != (w.shape[0], w.shape[2]):
        raise ValueError(f"bias is {list(bias.shape)}; for w {list(w.shape)} it must be {[w.shape[0], w.shape[2]]}")
    if act is not None and act not in ACTIVATIONS:
        raise ValueError(f"unknown activation {act!r}; it is one of {', '.join(ACTIVATIONS)}, or None")
    _rt.same_device(x=x, w=w, idx=idx, g=g, bias=bias)


def _check_values(idx: Tensor, experts: int) -> None:
    if torch.compiler.is_compiling() or not _rt.checks_indices(idx):
        return
    bad = (idx < 0) | (idx >= experts)
    if bool(bad.any()):
        raise IndexError(f"idx names expert {int(idx[bad][0])}, but there are {experts}: 0..{experts - 1}")


def _run(backend: str, x: Tensor) -> ModuleType:
    return _rt.kernels("meo") if _rt.choose(backend, x) == "triton" else ref


@torch.library.custom_op("lean_kernels::merged_matmul", mutates_args=())
def _merged_matmul(x: Tensor, w: Tensor, idx: Tensor, g: Tensor, shift: Tensor | None, backend: str) -> Tensor:
    _check_values(idx, w.shape[0])
    if x.numel() == 0:
        return x.new_zeros(x.shape[0], x.shape[1], w.shape[2])
    out: Tensor = _run(backend, x).merged_matmul(x, w, idx, g, shift)
    return out


@_merged_matmul.register_fake
def _(x: Tensor, w: Tensor, idx: Tensor, g: Tensor, shift: Tensor | None, backend: str) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], w.shape[2])


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, idx, g, shift, ctx.backend = inputs
    ctx.shift_dtype = None if shift is None else shift.dtype
    ctx.save_for_backward(x, w, idx, g)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, w, idx, g = ctx.saved_tensors
    for_x, for_w, _, for_g, for_shift, _ = ctx.needs_input_grad
    x_grad = _merged_matmul(grad, w.transpose(1, 2), idx, g, None, ctx.backend) if for_x else None
    w_grad = g_grad = None
    if for_w or for_g:
        w_grad, g_grad = _merged_matmul_backward(x, w, idx, g, grad, for_w, for_g, ctx.backend)
    shift_grad = grad.sum(1).to(ctx.shift_dtype) if for_shift else None
    return x_grad, w_grad if for_w else None, None, g_grad if for_g else None, shift_grad, None


_merged_matmul.register_autograd(_backward, setup_context=_context)


@torch.library.custom_op("lean_kernels::merged_matmul_backward", mutates_args=())
def _merged_matmul_backward(
    x: Tensor, w: Tensor, idx: Tensor, g: Tensor, grad: Tensor, for_w: bool, for_g: bool, backend: str
) -> tuple[Tensor, Tensor]:
    w_grad, g_grad = _run(backend, x).merged_matmul_backward(x, w, idx, g, grad, for_w, for_g)
    return w_grad, g_grad


@_merged_matmul_backward.register_fake
def _(
    x: Tensor, w: Tensor, idx: Tensor, g: Tensor, grad: Tensor, for_w: bool, for_g: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return w.new_empty(w.shape if for_w else (0,)), g.new_empty(g.shape if for_g else (0,))
