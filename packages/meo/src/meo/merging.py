"""A product with a mixture of experts, in either order: merge the matrices, or mix the outputs (section 3.2).

For one linear map both are the same sum; which is cheaper depends on how many tokens share a decision. Matrices are
merged by one product of all gates with all experts, a few groups at a time, and merged again in the backward pass:
however many groups there are, `merge_chunk` matrices exist. On a GPU the kernel of lean_kernels merges while it
multiplies. Groups with equal gates (untrained ones, one selected expert, beams) share a matrix, merged once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lean_kernels.ops.meo import merged_matmul


def mix(
    x: Tensor, weight: Tensor, bias: Tensor | None, idx: Tensor, g: Tensor, order: str = "auto", merge_chunk: int = 4
) -> Tensor:
    """x_b · (Σ_j g_bj W[idx_bj])ᵀ + Σ_j g_bj bias[idx_bj], [G, L, out].

    Args:
        x: [G, L, in]. weight: [n, out, in]. bias: [n, out]. idx, g: [G, k].
        order: auto, merge or output. auto is output where a group has one token, and merge elsewhere.
        merge_chunk: matrices merged at a time.
    """
    if order == "auto" and (x.is_cuda or x.shape[1] == 1):
        return merged_matmul(x, weight.mT, idx, g, bias)
    if order == "output":
        length = x.shape[1]
        experts, gates = (t.repeat_interleave(length, 0) for t in (idx, g))
        return mix_outputs(x.flatten(0, 1), weight, bias, experts, gates).unflatten(0, (-1, length))
    gates = scattered(weight, idx, g)
    out: Tensor = _Merged.apply(x, weight, gates, merge_chunk)
    return out if bias is None else out + (gates.to(bias.dtype) @ bias)[:, None]


def scattered(weight: Tensor, idx: Tensor, g: Tensor) -> Tensor:
    """Weights of all experts, [G, n], zero for those not selected."""
    return g.new_zeros(len(g), len(weight)).scatter_add(1, idx, g).to(weight.dtype)


class _Merged(torch.autograd.Function):
    """x_b · Ŵ_bᵀ with Ŵ_b = Σ_i g_bi W_i.

    Backward: dW_i = Σ_b g_bi dŴ_b and dg_bi = ⟨W_i, dŴ_b⟩, with dŴ_b = δ_bᵀ x_b.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gates: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(x, weight, gates)
        ctx.size = size
        if len(gates) > 1 and not torch.compiler.is_compiling():  # what is compiled has static shapes
            own, group = gates.unique(dim=0, return_inverse=True)
            if len(own) < len(gates):
                return _shared_product(x, weight, own, group, size)
        return torch.cat([_product(rows, weight, g) for rows, g in zip(x.split(size), gates.split(size))])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gates = ctx.saved_tensors
        flat = weight.flatten(1)  # [n, out * in]
        for_x, for_weight, for_gates, _ = ctx.needs_input_grad
        of_x, of_gates = [], []
        of_weight = torch.zeros_like(flat) if for_weight else None
        for rows, g, delta in zip(x.split(ctx.size), gates.split(ctx.size), grad.split(ctx.size)):
            if for_x:
                of_x.append(delta @ (g @ flat).view(-1, *weight.shape[1:]))
            if for_weight or for_gates:
                merged = (delta.mT @ rows).flatten(1)  # dŴ, [size, out * in]
                if of_weight is not None:
                    of_weight.addmm_(g.T, merged)
                of_gates.append(merged @ flat.T)
        return (
            torch.cat(of_x) if for_x else None, None if of_weight is None else of_weight.view_as(weight),
            torch.cat(of_gates) if for_gates else None, None,
        )  # fmt: skip


def _product(x: Tensor, weight: Tensor, gates: Tensor) -> Tensor:
    """[c, L, in] -> [c, L, out]; the merged matrices are gone when it returns."""
    return x @ (gates @ weight.flatten(1)).view(-1, *weight.shape[1:]).mT


def _shared_product(x: Tensor, weight: Tensor, own: Tensor, group: Tensor, size: int) -> Tensor:
    """`_product` where groups [G] number the gates that they share, `own` [U, n], U < G: U matrices are merged."""
    out = x.new_empty(*x.shape[:2], weight.shape[1])
    for start in range(0, len(own), size):
        matrices = (own[start : start + size] @ weight.flatten(1)).view(-1, *weight.shape[1:])
        for number, matrix in enumerate(matrices, start):
            rows = (group == number).nonzero().squeeze(1)
            out[rows] = x[rows] @ matrix.T
    return out


def merge(weight: Tensor, bias: Tensor | None, idx: Tensor, g: Tensor) -> tuple[Tensor, Tensor | None]:
    """Merged matrices [G, out, in] and biases [G, out], by one product of all gates with all experts."""
    gates = scattered(weight, idx, g)
    matrices = (gates @ weight.flatten(1)).view(-1, *weight.shape[1:])
    return matrices, None if bias is None else gates.to(bias.dtype) @ bias


def mix_outputs(x: Tensor, weight: Tensor, bias: Tensor | None, idx: Tensor, g: Tensor) -> Tensor:
    """Σ_j g_tj (x_t · W[idx_tj]ᵀ + bias[idx_tj]), [N, out]: a mixture of experts as usual, an expert at a time.

    Args:
        x: tokens, [N, in]. idx, g: of each token, [N, k].
    """
    out = x.new_zeros(len(x), weight.shape[1])
    for expert in range(len(weight)):
        tokens, place = (idx == expert).nonzero(as_tuple=True)
        product = torch.nn.functional.linear(x[tokens], weight[expert], None if bias is None else bias[expert])
        out = out.index_add(0, tokens, product * g[tokens, place, None].to(product.dtype))
    return out
