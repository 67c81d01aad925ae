"""Triton kernel of `lean_kernels.ops.linear_ce`: logits stay in registers, only sums over them are stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lean_kernels import _rt
from lean_kernels.ref.linear_ce import Parts, merge_parts

LOWEST = tl.constexpr(-1e38)  # below every logit, and finite: differences with it are no NaN


def _config(rows: int, columns: int, depth: int, warps: int, stages: int) -> Any:
    return triton.Config({"BM": rows, "BN": columns, "BK": depth}, num_warps=warps, num_stages=stages)


def _fits(values: Mapping[str, Any], warps: int, stages: int) -> bool:
    """Whether tiles fit into shared memory; float32 products also need registers, as tensor cores do not make them."""
    rows, columns, depth, size = values["BM"], values["BN"], values["BK"], values["h"].element_size()
    if size == 4 and (depth > 32 or rows * columns > 64 * 32 * warps):
        return False
    return bool(stages * depth * (rows + columns) * size <= _rt.shared_memory(values["h"]))


@triton.jit
def _logits(
    h, weight, bias, row, inside, column, V, H, h_t, h_h, w_v, w_h, scale, softcap,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Logits [BM, BN] of rows of h and of tokens of the vocabulary, float32."""
    acc = tl.zeros((BM, BN), tl.float32)
    at_h = h + row.to(tl.int64)[:, None] * h_t
    at_w = weight + column.to(tl.int64)[None, :] * w_v
    for start in range(0, H, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(at_h + k[None, :] * h_h, mask=inside[:, None] & (k < H)[None, :], other=0.0)
        b = tl.load(at_w + k[:, None] * w_h, mask=(k < H)[:, None] & (column < V)[None, :], other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    if BIAS:
        acc += tl.load(bias + column, mask=column < V, other=0.0).to(tl.float32)[None, :]
    acc *= scale
    if SOFTCAP:
        # tanh by exp of a number that is never positive
        ratio = acc / softcap
        e = tl.exp(-2 * tl.abs(ratio))
        acc = softcap * tl.where(ratio < 0, -1.0, 1.0) * (1 - e) / (1 + e)
    return acc


@triton.jit
def _target_kernel(
    h, weight, bias, order, target, found, counted, V, H, h_t, h_h, w_v, w_h, scale, softcap, vocab_start,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The logit of each row's target: the diagonal of a tile, so that it is summed as the main kernel sums it."""
    place = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = place < tl.load(counted)
    row = tl.load(order + place, mask=inside, other=0)
    token = (tl.load(target + row, mask=inside, other=0) - vocab_start).to(tl.int32)
    held = inside & (token >= 0) & (token < V)
    z = _logits(
        h, weight, bias, row, held, tl.where(held, token, 0), V, H, h_t, h_h, w_v, w_h, scale, softcap,
        BIAS, SOFTCAP, UPCAST, BM, BM, BK,
    )  # fmt: skip
    lane = tl.arange(0, BM)
    own = tl.sum(tl.where(lane[:, None] == lane[None, :], z, 0.0), 1)
    tl.store(found + place, own, mask=held)


@_rt.tune(
    [
        _config(64, 128, 64, 4, 3),
        _config(64, 256, 64, 8, 3),
        _config(128, 128, 64, 8, 3),
        _config(128, 256, 64, 8, 3),
        _config(128, 256, 64, 8, 4),
        _config(128, 128, 32, 4, 4),
        _config(64, 64, 32, 4, 3),
        _config(64, 128, 32, 8, 3),
        _config(128, 128, 32, 8, 3),
    ],
    key=["T_KEY", "V", "H"],
    fallback=_config(64, 128, 32, 4, 3),
    fits=_fits,
)
@triton.jit
def _sums_kernel(
    h, weight, bias, order, target, of_target, counted, top, sums, moments, ranks, bests,
    T, T_KEY, V, H, h_t, h_h, w_v, w_h, scale, softcap, vocab_start, per_split,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, RANK: tl.constexpr, ARGMAX: tl.constexpr,
    UPCAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Over one split of the vocabulary: greatest logit, sum of exp, their moment, logits above the target, argmax."""
    n = tl.load(counted)
    if tl.program_id(0) * BM < n:
        place = tl.program_id(0) * BM + tl.arange(0, BM)
        split = tl.program_id(1)
        inside = place < n
        row = tl.load(order + place, mask=inside, other=0)
        m = tl.full((BM,), LOWEST, tl.float32)
        s = tl.zeros((BM,), tl.float32)
        u = tl.zeros((BM,), tl.float32)  # sum of exp(z - m)·(z - m)
        above = tl.zeros((BM,), tl.int32)
        best = tl.zeros((BM,), tl.int32)
        if RANK:
            token = (tl.load(target + row, mask=inside, other=0) - vocab_start).to(tl.int32)
            wanted = tl.load(of_target + place, mask=inside, other=0.0)
        first = split * per_split
        for start in range(first, tl.minimum(first + per_split, V), BN):
            column = start + tl.arange(0, BN)
            z = _logits(
                h, weight, bias, row, inside, column, V, H, h_t, h_h, w_v, w_h, scale, softcap,
                BIAS, SOFTCAP, UPCAST, BM, BN, BK,
            )  # fmt: skip
            held = column < tl.minimum(first + per_split, V)
            z = tl.where(held[None, :], z, LOWEST)
            if RANK:
                greater = (z > wanted[:, None]) & held[None, :] & (column[None, :] != token[:, None])
                above += tl.sum(greater.to(tl.int32), 1)
            largest = tl.max(z, 1)
            if ARGMAX:
                best = tl.where(largest > m, start + tl.argmax(z, 1).to(tl.int32), best)
            new = tl.maximum(m, largest)
            shrink = tl.exp(m - new)
            e = tl.where(held[None, :], tl.exp(z - new[:, None]), 0.0)
            if ENTROPY:
                u = shrink * (u + s * (m - new)) + tl.sum(tl.where(e == 0, 0.0, e * (z - new[:, None])), 1)
            s = s * shrink + tl.sum(e, 1)
            m = new
        at = split.to(tl.int64) * T + place
        tl.store(top + at, m, mask=inside)
        tl.store(sums + at, s, mask=inside)
        if ENTROPY:
            tl.store(moments + at, u, mask=inside)
        if RANK:
            tl.store(ranks + at, above, mask=inside)
        if ARGMAX:
            tl.store(bests + at, best, mask=inside)


def _splits(rows: int, vocabulary: int, device: torch.device) -> int:
    """Parts of the vocabulary, so that a GPU has about two programs a multiprocessor; two in the interpreter."""
    most = -(-vocabulary // 256)
    if device.type != "cuda":
        return min(2, most)
    processors = int(torch.cuda.get_device_properties(device).multi_processor_count)
    return max(1, min(most, 2 * processors // -(-rows // 128)))


@_rt.launcher
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
    """As `lean_kernels.ref.linear_ce.linear_ce`. No host synchronisation: rows that count come first, by a sort."""
    total, vocabulary = len(h), len(weight)
    # along a row offsets are 32 bit; only a matrix of 2^31 numbers that is stored by columns is beyond them
    h, weight = (t if t.shape[1] * t.stride(1) < 1 << 31 else t.contiguous() for t in (h, weight))
    ignored = target == ignore_index
    order = torch.argsort(ignored.to(torch.int8), stable=True)
    counted = (total - ignored.sum()).to(torch.int32)
    of_target = torch.full((total,), -torch.inf, dtype=torch.float32, device=h.device)
    splits = _splits(total, vocabulary, h.device) if total else 1
    per_split = triton.cdiv(triton.cdiv(vocabulary, splits), 256) * 256
    splits = triton.cdiv(vocabulary, per_split)
    # rows without a program keep these: they count in no sum
    top = torch.zeros(splits, total, dtype=torch.float32, device=h.device)
    sums = torch.ones_like(top)
    moments = torch.zeros(splits if entropy else 0, total, dtype=torch.float32, device=h.device)
    ranks, bests = (
        torch.zeros(splits if asked else 0, total, dtype=torch.int32, device=h.device) for asked in (rank, argmax)
    )
    shared = (vocabulary, h.shape[1], *h.stride(), *weight.stride(), logit_scale, softcap or 1.0, vocab_start)
    flags = {"BIAS": bias is not None, "SOFTCAP": softcap is not None, "UPCAST": _rt.INTERPRET}
    if total:
        _target_kernel[(triton.cdiv(total, 16),)](
            h, weight, bias, order, target, of_target, counted, *shared, **flags, BM=16, BK=64
        )
        _sums_kernel[lambda meta: (triton.cdiv(total, meta["BM"]), splits)](
            h, weight, bias, order, target, of_target, counted, top, sums, moments, ranks, bests,
            total, _rt.bucket(total), *shared, per_split,
            **flags, ENTROPY=entropy, RANK=rank, ARGMAX=argmax,
        )  # fmt: skip
    results = merge_parts(Parts(top, sums, moments, ranks, bests), of_target)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(total, device=h.device))
    return tuple(value[back].masked_fill(ignored, 0) if len(value) else value for value in results)
