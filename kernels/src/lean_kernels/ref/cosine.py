"""Cosines of hidden-state streams in plain torch: the CPU path of `lean_kernels.ops.cosine` and its oracle.

Half precision is summed in float32, float64 in float64. Tokens go through in chunks that stay in a core's cache, so no
float32 copy of a stream is ever made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lean_kernels._rt import sum_dtype

CHUNK = 1 << 18  # values worked on at a time: 1 MB in float32, about what a core has as cache of its own


def cosine_stream(x: Tensor, y: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cosine of x[t] and y[t], and whether one of them is zero; both [T], 0 and False where the mask is False."""
    cos = torch.empty(x.shape[0], dtype=sum_dtype(x), device=x.device)
    zero = torch.empty(x.shape[0], dtype=torch.bool, device=x.device)
    for part in _chunks(x.shape[0], x.shape[1]):
        a, b = x[part].to(cos.dtype), y[part].to(cos.dtype)
        _write(cos, zero, part, a, b, _norm(a), _norm(b))
    return _masked(cos, zero, mask)


def cosine_adjacent(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cosine of x[l, t] and x[l + 1, t], and whether one of them is zero; both [Lp - 1, T]."""
    layers, tokens, hidden = x.shape
    cos = torch.empty(layers - 1, tokens, dtype=sum_dtype(x), device=x.device)
    zero = torch.empty(layers - 1, tokens, dtype=torch.bool, device=x.device)
    for part in _chunks(tokens, hidden):
        last = x[0, part].to(cos.dtype)
        last_norm = _norm(last)
        for layer in range(1, layers):  # every value is read once, and every norm computed once
            here = x[layer, part].to(cos.dtype)
            here_norm = _norm(here)
            _write(cos[layer - 1], zero[layer - 1], part, last, here, last_norm, here_norm)
            last, last_norm = here, here_norm
    return _masked(cos, zero, mask)


def cosine_gram(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums over tokens of cos(x[i, t], x[j, t]), float64, and numbers of tokens with both nonzero; both [Lp, Lp].

    With unit vectors, the sum over tokens of [Lp, H] · [H, Lp] is one product of the chunk, [Lp, n·H] · [n·H, Lp].
    """
    layers, tokens, hidden = x.shape
    sums = torch.zeros(layers, layers, dtype=torch.float64, device=x.device)
    live = torch.zeros(layers, tokens, dtype=torch.float64, device=x.device)
    for part in _chunks(tokens, layers * hidden):
        units = x[:, part].to(sum_dtype(x))  # [Lp, n, H]
        if mask is not None:
            units = units.where(mask[part][:, None], 0)
        norm = _norm(units)
        keep = norm != 0
        units = (units * torch.where(keep, norm, 1).reciprocal_()[..., None]).flatten(1)
        sums += units @ units.T
        live[:, part] = keep.to(live.dtype)
    return sums, (live @ live.T).to(torch.int64)


def _write(cos: Tensor, zero: Tensor, part: slice, a: Tensor, b: Tensor, a_norm: Tensor, b_norm: Tensor) -> None:
    """Fill one chunk. The norms are multiplied, not their squares, whose product overflows from norms of 1e9 on."""
    size = a_norm * b_norm
    zero[part] = empty = (a_norm == 0) | (b_norm == 0)
    cos[part] = torch.where(empty, 0, (a * b).sum(-1) / size)


def _norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1)
    return norm


def _masked(cos: Tensor, zero: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    return (cos, zero) if mask is None else (cos.where(mask, 0), zero & mask)


def _chunks(tokens: int, values: int) -> list[slice]:
    """Slices of so many tokens, of `values` each, that one chunk has about CHUNK values."""
    step = max(1, CHUNK // max(1, values))
    return [slice(start, start + step) for start in range(0, tokens, step)]
