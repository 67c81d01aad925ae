"""2:4 sparse weights: check, pack, unpack, and the product with few rows, which reads 9/16 of the dense bytes in half
precision. For many rows the weight is unpacked and multiplied densely, as time then goes to arithmetic.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lean_kernels import _rt
from lean_kernels.ref import sparse24 as ref


class Packed24(NamedTuple):
    """A 2:4 sparse [N, K].

    Args:
        values: [N, K / 2], two of every four along K.
        places: int32 [N, ceil(K / 32)]: 4 bits for each group of four, the places (0 to 3) of its two values.
    """

    values: Tensor
    places: Tensor


def check_24(w: Tensor) -> None:
    """Raise ValueError unless at most two of every four consecutive weights of a row are nonzero; w is [N, K]."""
    if w.dim() != 2 or w.shape[1] % 4:
        raise ValueError(f"w is {list(w.shape)}; [N, K] with K a multiple of 4 is needed for 2:4 sparsity")
    over = (w.reshape(w.shape[0], -1, 4) != 0).sum(-1) > 2
    if bool(over.any()):
        row, group = over.nonzero()[0].tolist()
        raise ValueError(
            f"row {row}, group {group} (columns {4 * group} to {4 * group + 3}) has more than 2 nonzero weights; "
            "prune w to 2:4 first"
        )


def pack_24(w: Tensor) -> Packed24:
    """Pack a 2:4 sparse w [N, K]. `unpack_24` gives an equal one back (a zero loses its sign). Raises as `check_24`."""
    check_24(w)
    return Packed24(*ref.pack(w.contiguous()))


def unpack_24(packed: Packed24) -> Tensor:
    """The dense [N, K] of `pack_24`."""
    return ref.unpack(packed.values, packed.places)


def matmul_24(x: Tensor, packed: Packed24, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """x · Wᵀ + bias, [..., N], for x [..., K] and a packed W [N, K]. For inference: there is no gradient.

    Raises:
        ValueError: shapes that do not match.
        TypeError: dtypes that differ.
    """
    values, places = packed
    depth = 2 * values.shape[1]
    if x.shape[-1] != depth:
        raise ValueError(
            f"x is {list(x.shape)}; for a packed weight {[values.shape[0], depth]} it must be [..., {depth}]"
        )
    if bias is not None and bias.shape != values.shape[:1]:
        raise ValueError(f"bias is {list(bias.shape)}; it must be [{values.shape[0]}]")
    for name, tensor in (("x", x), ("bias", bias)):
        if tensor is not None and tensor.dtype != values.dtype:
            raise TypeError(f"{name} is {tensor.dtype} and the weight is {values.dtype}; convert one of them")
    _rt.same_device(x=x, values=values, places=places, bias=bias)
    out: Tensor = _matmul_24(x.reshape(-1, depth), values, places, bias, backend)
    return out.view(*x.shape[:-1], values.shape[0])


@torch.library.custom_op("lean_kernels::matmul_24", mutates_args=())
def _matmul_24(x: Tensor, values: Tensor, places: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    run = ref
    if _rt.choose(backend, x) == "triton":
        kernels = _rt.kernels("sparse24")
        if x.shape[0] > kernels.SMALL:
            return torch.nn.functional.linear(x, ref.unpack(values, places), bias)
        run = kernels
    out: Tensor = run.matmul_24(x, values, places, bias)
    return out


@_matmul_24.register_fake
def _(x: Tensor, values: Tensor, places: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return x.new_empty(x.shape[0], values.shape[0])
