"""LoRA on a pruned weight: y = x · (M ⊙ (W + s·B·A))ᵀ + bias, without ever storing B·A (SparseLoRA).

For a W that is pruned by M this is W + s·M ⊙ (B·A). The mask is applied to the sum, so W may as well be the dense
weight that was pruned. W is frozen. The mask is bool, or its bits from `pack_mask`: an eighth of the memory, and what
the Triton kernels read, so pack it once. A CPU reads a bool mask faster.

The gradients of A and B are exact, or straight-through: those of plain LoRA, which costs no product of W's size.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lean_kernels import _rt
from lean_kernels.ref import sparse_lora as ref
from lean_kernels.ref.sparse_lora import pack_mask, unpack_mask

__all__ = ["apply_mask_", "merge_sparse_lora", "pack_mask", "sparse_lora_matmul", "unpack_mask"]


def sparse_lora_matmul(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    mask: Tensor,
    scale: float = 1.0,
    bias: Tensor | None = None,
    *,
    straight_through: bool = False,
    backend: str = "auto",
) -> Tensor:
    """x · (mask ⊙ (w + scale · b · a))ᵀ + bias, [..., N]. Differentiable in x, a, b and bias; w is frozen.

    Args:
        x: [..., K].
        w: [N, K].
        a, b: LoRA's factors, [r, K] and [N, r]; all of one dtype with x, w and bias.
        mask: bool [N, K], True where a weight is kept, or int32 [N, ceil(K / 32)] from `pack_mask`.
        bias: [N].
        straight_through: Leave the mask out of the gradients of a and b, and only there.

    Raises:
        ValueError: shapes that do not match, or a w that asks for a gradient.
        TypeError: a dtype that is not accepted.
    """
    _check(w, a, b, mask, x=x, bias=bias)
    if x.shape[-1:] != w.shape[1:]:
        raise ValueError(f"x is {list(x.shape)}; for w {list(w.shape)} it must be [..., {w.shape[1]}]")
    if bias is not None and bias.shape != w.shape[:1]:
        raise ValueError(f"bias is {list(bias.shape)}; for w {list(w.shape)} it must be [{w.shape[0]}]")
    if w.requires_grad and torch.is_grad_enabled():
        raise ValueError("w asks for a gradient, but the base weight is frozen here; call w.requires_grad_(False)")
    rows = x.reshape(-1, x.shape[-1])
    run = _matmul_op if torch.compiler.is_compiling() else _Eager.apply
    out: Tensor = run(rows, w, a, b, mask, scale, bias, straight_through, backend)
    return out.view(*x.shape[:-1], w.shape[0])


def merge_sparse_lora(w: Tensor, a: Tensor, b: Tensor, mask: Tensor, scale: float = 1.0) -> Tensor:
    """mask ⊙ (w + scale · b · a), [N, K]: exactly 0 outside the mask (a zero may carry a sign). No gradient.

    Args, Raises: as `sparse_lora_matmul`. Plain torch on every device: a checkpoint is merged once.
    """
    _check(w, a, b, mask)
    with torch.no_grad():
        return ref.merge_sparse_lora(w, a, b, mask, scale)


def apply_mask_(x: Tensor, mask: Tensor) -> Tensor:
    """Make x [N, K] exactly 0 where the mask is False, in place, whatever was there; gives x. No gradient.

    Args, Raises: as `sparse_lora_matmul`. Plain torch; on a CPU up to ten times faster than `masked_fill_`.
    """
    _check_mask(x, mask, "x")
    with torch.no_grad():
        return ref.apply_mask_(x, mask)


def _check(w: Tensor, a: Tensor, b: Tensor, mask: Tensor, **others: Tensor | None) -> None:
    if w.dim() != 2 or a.dim() != 2 or a.shape[1] != w.shape[1] or b.shape != (w.shape[0], a.shape[0]):
        raise ValueError(
            f"w is {list(w.shape)}, a {list(a.shape)} and b {list(b.shape)}; [N, K], [r, K] and [N, r] are needed"
        )
    if not w.is_floating_point():
        raise TypeError(f"w is {w.dtype}; it must be float32, float16, bfloat16 or float64")
    for name, tensor in {"a": a, "b": b, **others}.items():
        if tensor is not None and tensor.dtype != w.dtype:
            raise TypeError(f"{name} is {tensor.dtype} and w is {w.dtype}; convert one of them")
    _check_mask(w, mask, "w")
    _rt.same_device(w=w, a=a, b=b, mask=mask, **others)


def _check_mask(w: Tensor, mask: Tensor, name: str) -> None:
    if w.dim() != 2:
        raise ValueError(f"{name} is {list(w.shape)}; [N, K] is needed")
    if mask.dtype not in (torch.bool, torch.int32):
        raise TypeError(f"mask is {mask.dtype}; it must be bool, or int32 from pack_mask")
    shape = [w.shape[0], w.shape[1] if mask.dtype == torch.bool else -(-w.shape[1] // 32)]
    if list(mask.shape) != shape:
        raise ValueError(f"mask is {list(mask.shape)} {mask.dtype}; for {name} {list(w.shape)} it must be {shape}")


def _run(backend: str, x: Tensor, a: Tensor) -> ModuleType:
    if _rt.choose(backend, x) == "triton" and a.shape[0] <= (kernels := _rt.kernels("sparse_lora")).MAX_RANK:
        return kernels
    return ref


def _mask_for(run: ModuleType, mask: Tensor) -> Tensor:
    return mask if run is ref or mask.dtype == torch.int32 else pack_mask(mask)


def _forward(
    x: Tensor, w: Tensor, a: Tensor, b: Tensor, mask: Tensor, scale: float, bias: Tensor | None,
    straight_through: bool, backend: str,
) -> Tensor:  # fmt: skip
    run = _run(backend, x, a)
    out: Tensor = run.sparse_lora_matmul(x, w, a, b, _mask_for(run, mask), scale, bias)
    return out


def _gradients(
    grad: Tensor, x: Tensor, w: Tensor, a: Tensor, b: Tensor, mask: Tensor, scale: float, for_x: bool, for_ab: bool,
    straight_through: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    run = _run(backend, x, a)
    x_grad, a_grad, b_grad = run.sparse_lora_backward(
        grad, x, w, a, b, _mask_for(run, mask), scale, for_x, for_ab and not straight_through
    )
    if for_ab and straight_through:  # thin products, which no kernel of ours does better
        a_grad, b_grad = ref.straight_through(grad, x, a, b, scale)
    return x_grad, a_grad, b_grad


_matmul_op = torch.library.custom_op("lean_kernels::sparse_lora_matmul", _forward, mutates_args=())
_gradients_op = torch.library.custom_op("lean_kernels::sparse_lora_backward", _gradients, mutates_args=())


@_matmul_op.register_fake
def _(
    x: Tensor, w: Tensor, a: Tensor, b: Tensor, mask: Tensor, scale: float, bias: Tensor | None,
    straight_through: bool, backend: str,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], w.shape[0])


@_gradients_op.register_fake
def _(
    grad: Tensor, x: Tensor, w: Tensor, a: Tensor, b: Tensor, mask: Tensor, scale: float, for_x: bool, for_ab: bool,
    straight_through: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    factors = (a.new_empty(a.shape), b.new_empty(b.shape)) if for_ab else (a.new_empty(0), b.new_empty(0))
    return x.new_empty(x.shape if for_x else (0,)), *factors


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, a, b, mask, ctx.scale, _, ctx.straight_through, ctx.backend = inputs
    ctx.save_for_backward(x, w, a, b, mask)


def _backward(
    ctx: Any, grad: Tensor, gradients: Callable[..., tuple[Tensor, Tensor, Tensor]] = _gradients_op
) -> tuple[Tensor | None, ...]:
    x, w, a, b, mask = ctx.saved_tensors
    for_x, _, for_a, for_b, _, _, for_bias, _, _ = ctx.needs_input_grad
    x_grad, a_grad, b_grad = gradients(
        grad, x, w, a, b, mask, ctx.scale, for_x, for_a or for_b, ctx.straight_through, ctx.backend
    )
    bias_grad = grad.sum(0) if for_bias else None
    found = (a_grad if for_a else None, b_grad if for_b else None)
    return x_grad if for_x else None, None, *found, None, None, bias_grad, None, None


_matmul_op.register_autograd(_backward, setup_context=_context)


class _Eager(torch.autograd.Function):
    """The operation where nothing is traced: the dispatch of a custom one costs 0.2 ms a step and layer."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        out = _forward(*inputs)
        _context(ctx, inputs, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grads[0], _gradients)
