"""Triton kernels of `lean_kernels.ops.loki`: score, select (loki_select.py), attend, merge. No host synchronisation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lean_kernels import _rt

from .loki_select import LOWEST, Scored, Visibility, choose, seen_of, set_of, span_of

SCORE_TILE = 128
LARGEST = tl.constexpr(3.4028234e38)  # what an infinite score counts as in a softmax


@triton.jit
def _row_of(token, b, h, table, table_b, page, c_b, c_h, c_s, valid, PAGED: tl.constexpr):
    """Offsets of tokens' rows in a cache [B, Hkv, capacity, D], or [pages, Hkv, page, D] with a table of pages."""
    if PAGED:
        number = tl.load(table + b * table_b + token // page, mask=valid, other=0).to(tl.int64)
        return number * c_b + h.to(tl.int64) * c_h + (token % page).to(tl.int64) * c_s
    else:
        return b.to(tl.int64) * c_b + h.to(tl.int64) * c_h + token.to(tl.int64) * c_s


@triton.jit
def _score_kernel(
    q, k, table, lens, start, states, scores, tops, sums, kv_heads, queries, S, tiles, group, width, page, table_b,
    q_b, q_h, q_q, q_d, k_b, k_h, k_s, k_d, scale,
    MAX: tl.constexpr, MEAN: tl.constexpr, STARTS: tl.constexpr, MASKED: tl.constexpr, PAGED: tl.constexpr,
    UPCAST: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Scores of one tile of tokens for one group of query heads; NaN is -inf."""
    base, tile = tl.program_id(0), tl.program_id(1)
    b, h, i, _g = set_of(base, 1, kv_heads, queries)
    lo, hi = span_of(lens, start, b, i, queries, STARTS)
    lane, dim = tl.arange(0, GP), tl.arange(0, DP)
    row = base.to(tl.int64) * group + lane
    if (tile * BN < hi) & (tile * BN + BN > lo):
        token = tile * BN + tl.arange(0, BN)
        seen = seen_of(token, lo, hi, states, b, i, queries, S, MASKED)
        at = b.to(tl.int64) * q_b + i * q_q + (h * group + lane)[:, None].to(tl.int64) * q_h + dim[None, :] * q_d
        query = tl.load(q + at, mask=(lane < group)[:, None] & (dim < width)[None, :], other=0.0)
        rows = _row_of(token, b, h, table, table_b, page, k_b, k_h, k_s, seen, PAGED)
        keys = tl.load(k + rows[None, :] + dim[:, None] * k_d, mask=(dim < width)[:, None] & seen[None, :], other=0.0)
        if UPCAST:
            query, keys = query.to(tl.float32), keys.to(tl.float32)
        z = tl.dot(query, keys, input_precision="ieee") * scale
        kept = (lane < group)[:, None] & seen[None, :]
        z = tl.where(kept & (z == z), z, -float("inf"))
        if MAX:
            tl.store(scores + base.to(tl.int64) * S + token, tl.max(z, 0), mask=seen)
        else:
            if MEAN:
                z = tl.minimum(z, LARGEST)
                top = tl.maximum(tl.max(z, 1), LOWEST)
                total = tl.sum(tl.exp(z - top[:, None]), 1)
                tl.store(tops + row * tiles + tile, top, mask=lane < group)
                tl.store(sums + row * tiles + tile, total, mask=lane < group)
            tl.store(scores + row[:, None] * S + token[None, :], z, mask=kept)
    else:
        if MEAN:
            tl.store(tops + row * tiles + tile, tl.full((GP,), LOWEST, tl.float32), mask=lane < group)
            tl.store(sums + row * tiles + tile, tl.zeros((GP,), tl.float32), mask=lane < group)


def _fits(values: Mapping[str, Any], warps: int, stages: int) -> bool:
    """Whether tiles fit into shared memory; float32 products also need registers, as tensor cores do not make them."""
    tokens, lanes, size = values["BN"], values["GP"], values["q"].element_size()
    rows = (tokens + lanes) * values["DP"]  # of keys and queries, and as many of values and sums
    if size == 4 and rows > 72 * 32 * warps:
        return False
    return bool(2 * rows * size + 4 * lanes * tokens <= _rt.shared_memory(values["q"]))


@_rt.tune(
    [
        triton.Config({"BN": n}, num_warps=w, num_stages=s)
        for n, w, s in ((32, 4, 2), (32, 8, 2), (64, 4, 2), (64, 4, 3), (64, 8, 2), (128, 4, 2), (128, 8, 2))
    ],
    key=["WIDTH_KEY", "DP", "PER", "BLOCK"],
    fallback=triton.Config({"BN": 32}, num_warps=8, num_stages=2),
    fits=_fits,
)
@triton.jit
def _attend_kernel(
    q, k, v, table, lens, start, states, chosen, count, out, lse, outs, lses,
    kv_heads, queries, S, group, D, page, table_b, list_width, per_split, splits, WIDTH_KEY,
    q_b, q_h, q_q, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d, o_b, o_h, o_q, l_b, l_h, scale, softcap,
    PER: tl.constexpr, BLOCK: tl.constexpr, STARTS: tl.constexpr, MASKED: tl.constexpr, PAGED: tl.constexpr,
    SOFTCAP: tl.constexpr, FINAL: tl.constexpr, UPCAST: tl.constexpr,
    GP: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Attention to one split of a set's chosen tokens, exact in all D dimensions, with a running softmax."""
    s, split = tl.program_id(0), tl.program_id(1)
    b, h, i, g = set_of(s, PER, kv_heads, queries)
    lo, hi = span_of(lens, start, b, i, queries, STARTS)
    lane, dim = tl.arange(0, GP), tl.arange(0, DP)
    heads = group // PER  # query heads that read this set
    head = h * group + g * heads + lane
    at = b.to(tl.int64) * q_b + i * q_q + head[:, None].to(tl.int64) * q_h + dim[None, :] * q_d
    query = tl.load(q + at, mask=(lane < heads)[:, None] & (dim < D)[None, :], other=0.0)
    if UPCAST:
        query = query.to(tl.float32)
    m = tl.full((GP,), LOWEST, tl.float32)
    total = tl.zeros((GP,), tl.float32)
    acc = tl.zeros((GP, DP), tl.float32)
    end = tl.minimum(tl.load(count + s) * BLOCK, (split + 1) * per_split)
    for first in range(split * per_split, end, BN):
        place = first + tl.arange(0, BN)
        unit = tl.load(chosen + s.to(tl.int64) * list_width + place // BLOCK, mask=place < end, other=0)
        token = unit * BLOCK + place % BLOCK
        valid = place < end
        if BLOCK > 1:
            valid &= seen_of(token, lo, hi, states, b, i, queries, S, MASKED)
        read = valid[:, None] & (dim < D)[None, :]
        rows = _row_of(token, b, h, table, table_b, page, k_b, k_h, k_s, valid, PAGED)
        keys = tl.load(k + rows[:, None] + dim[None, :] * k_d, mask=read, other=0.0)
        if UPCAST:
            keys = keys.to(tl.float32)
        z = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
        if SOFTCAP:
            e = tl.exp(-2 * tl.abs(z / softcap))
            z = softcap * tl.where(z < 0, -1.0, 1.0) * (1 - e) / (1 + e)
        z = tl.where(valid[None, :], z, -float("inf"))
        new = tl.maximum(m, tl.max(z, 1))
        shrink = tl.exp(m - new)
        weights = tl.exp(z - new[:, None])
        total = total * shrink + tl.sum(weights, 1)
        rows = _row_of(token, b, h, table, table_b, page, v_b, v_h, v_s, valid, PAGED)
        values = tl.load(v + rows[:, None] + dim[None, :] * v_d, mask=read, other=0.0)
        if UPCAST:
            values = values.to(tl.float32)
        acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
        m = new
    if FINAL:
        some = total != 0
        acc = acc / tl.where(some, total, 1.0)[:, None]
        at = b.to(tl.int64) * o_b + head[:, None].to(tl.int64) * o_h + i * o_q + dim[None, :]
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=(lane < heads)[:, None] & (dim < D)[None, :])
        log_sum = tl.where(some, m + tl.log(tl.where(some, total, 1.0)), -float("inf"))
        tl.store(lse + b * l_b + head * l_h + i, log_sum, mask=lane < heads)
    else:
        row = (s.to(tl.int64) * splits + split) * heads + lane
        tl.store(outs + row[:, None] * D + dim[None, :], acc, mask=(lane < heads)[:, None] & (dim < D)[None, :])
        tl.store(lses + row * 2, m, mask=lane < heads)
        tl.store(lses + row * 2 + 1, total, mask=lane < heads)


@triton.jit
def _merge_kernel(
    outs, lses, out, lse, kv_heads, queries, group, D, splits, o_b, o_h, o_q, l_b, l_h,
    PER: tl.constexpr, SPLITS: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """One query head from its splits: sums with a common maximum."""
    s, lane = tl.program_id(0), tl.program_id(1)
    b, h, i, g = set_of(s, PER, kv_heads, queries)
    heads = group // PER
    head = h * group + g * heads + lane
    split, dim = tl.arange(0, SPLITS), tl.arange(0, DP)
    row = (s.to(tl.int64) * splits + split) * heads + lane
    m = tl.load(lses + row * 2, mask=split < splits, other=LOWEST)
    part = tl.load(lses + row * 2 + 1, mask=split < splits, other=0.0)
    top = tl.max(m, 0)
    share = tl.exp(m - top)
    total = tl.sum(share * part, 0)
    inside = (split < splits)[:, None] & (dim < D)[None, :]
    partial = tl.load(outs + row[:, None] * D + dim[None, :], mask=inside, other=0.0)
    some = total != 0
    value = tl.sum(partial * share[:, None], 0) / tl.where(some, total, 1.0)
    at = b.to(tl.int64) * o_b + head.to(tl.int64) * o_h + i * o_q
    tl.store(out + at + dim, value.to(out.dtype.element_ty), mask=dim < D)
    tl.store(lse + b * l_b + head * l_h + i, tl.where(some, top + tl.log(tl.where(some, total, 1.0)), -float("inf")))


@_rt.launcher
def loki_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lens: Tensor,
    *,
    d: int,
    topk: int | Tensor,
    scale: float,
    select: str,
    reduce: str,
    sink: int,
    recent: int,
    block: int,
    block_table: Tensor | None,
    start: Tensor | None,
    softcap: float | None,
    return_lse: bool,
    mask: Tensor | None,
) -> Any:
    """As `lean_kernels.ref.loki.loki_decode`."""
    rows, heads, queries, _ = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    room = k.shape[2] if block_table is None else block_table.shape[1] * k.shape[2]
    topk_rows = topk if isinstance(topk, Tensor) and topk.ndim else None
    most = room if topk_rows is not None else min(max(int(topk), sink + recent), room)
    per = group if select == "head" else 1
    sets = rows * kv_heads * queries * per
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float32, device=q.device)
    if sets and room:
        if block_table is not None:
            block_table = block_table.contiguous()
        seen = _visibility(lens, start, mask, room, topk, sink, recent, block, queries)
        scored = _score(q, k, block_table, seen, room, d, scale, reduce, per)
        width = most if block == 1 else _most_blocks(most, sink, recent, block, room, mask is not None)
        chosen, count = choose(
            scored, seen, sets=sets, kv_heads=kv_heads, queries=queries, topk=most, topk_rows=topk_rows,
            sink=sink, recent=recent, block=block, width=width,
        )  # fmt: skip
        _attend(q, k, v, block_table, seen, chosen, count, out, lse, per, block, room, scale, softcap)
    return (out, lse) if return_lse else out


def _most_blocks(most: int, sink: int, recent: int, block: int, room: int, masked: bool) -> int:
    """How many blocks a set may have. A run of n tokens lies in up to ceil(n / block) + 1, masked ones anywhere."""
    every = -(-room // block)
    forced = sum(-(-n // block) + 1 for n in (sink, recent) if n)
    return every if masked else min(max(-(-most // block) + 1, forced), every)


def _visibility(
    lens: Tensor, start: Tensor | None, mask: Tensor | None, room: int, topk: int | Tensor, sink: int, recent: int,
    block: int, queries: int,
) -> Visibility:  # fmt: skip
    if mask is None:
        return Visibility(lens, start, None, None)
    token = torch.arange(room, device=lens.device, dtype=torch.int32)
    hi = lens[:, None] - queries + 1 + torch.arange(queries, device=lens.device)
    seen = token < hi[:, :, None]
    if start is not None:
        seen &= token >= start[:, None, None]
    seen[..., : mask.shape[-1]] &= mask[:, 0, :, :room]
    seen[..., mask.shape[-1] :] = False
    order = seen.cumsum(-1, dtype=torch.int32)
    n = order[..., -1:]
    forced = seen & ((order <= sink) | (order > n - recent))
    if isinstance(topk, Tensor) and topk.ndim:
        wanted = topk[:, None]
    else:
        wanted = torch.full((), int(topk), device=lens.device)  # a copy from the host could not be captured in a graph
    counts = wanted.clamp(min=sink + recent).minimum(n[..., 0])
    if block > 1:
        pad = -room % block
        whole, always = (
            torch.nn.functional.pad(flag, (0, pad)).unflatten(-1, (-1, block)).any(-1).sum(-1)
            for flag in (seen, forced)
        )
        blocks = ((counts + block - 1) // block).maximum(always).minimum(whole)
        counts = torch.where(counts < n[..., 0], blocks, whole)
    return Visibility(lens, start, seen.to(torch.int8) + forced, counts.to(torch.int32).contiguous())


def _score(
    q: Tensor,
    k: Tensor,
    table: Tensor | None,
    seen: Visibility,
    room: int,
    d: int,
    scale: float,
    reduce: str,
    per: int,
) -> Scored:
    rows, heads, queries, _ = q.shape
    kv_heads = k.shape[1]
    group, bases = heads // kv_heads, rows * kv_heads * queries
    mean = per == 1 and reduce == "softmax_mean" and group > 1
    largest = per == 1 and not mean
    dims = _rt.bucket(d)
    tile = SCORE_TILE if dims * q.element_size() <= 512 else SCORE_TILE // 2  # what registers and shared memory hold
    tiles = triton.cdiv(room, tile)
    scores = torch.empty(bases * (1 if largest else group), room, dtype=torch.float32, device=q.device)
    tops = torch.empty(bases * group if mean else 0, tiles, dtype=torch.float32, device=q.device)
    sums = torch.empty_like(tops)
    _score_kernel[(bases, tiles)](
        q, k, table, seen.lens, seen.start, seen.states, scores, tops, sums,
        kv_heads, queries, room, tiles, group, d, k.shape[2], 0 if table is None else table.stride(0),
        *q.stride(), *k.stride(), scale,
        MAX=largest, MEAN=mean, STARTS=seen.start is not None, MASKED=seen.states is not None, PAGED=table is not None,
        UPCAST=_rt.INTERPRET, GP=_rt.bucket(group), DP=dims, BN=tile,
        num_warps=8 if dims * q.element_size() > 256 else 4,
    )  # fmt: skip
    return Scored(scores, tops, sums, tiles, mean, per, group)


def _splits(sets: int, positions: int, device: torch.device) -> int:
    """Splits of a set's tokens, so that a GPU has about three programs a multiprocessor; two in the interpreter."""
    most = -(-positions // 128)
    if device.type != "cuda":
        return min(2, most)
    processors = int(torch.cuda.get_device_properties(device).multi_processor_count)
    return max(1, min(most, 64, 3 * processors // sets))


def _attend(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, seen: Visibility, chosen: Tensor, count: Tensor,
    out: Tensor, lse: Tensor, per: int, block: int, room: int, scale: float, softcap: float | None,
) -> None:  # fmt: skip
    _, heads, queries, width = q.shape
    kv_heads, sets = k.shape[1], len(chosen)
    group = heads // kv_heads
    positions = chosen.shape[1] * block
    splits = _splits(sets, positions, q.device)
    per_split = triton.cdiv(triton.cdiv(positions, splits), 128) * 128
    splits = triton.cdiv(positions, per_split)
    kept = splits if splits > 1 else 0
    outs = torch.empty(sets, kept, group // per, width, dtype=torch.float32, device=q.device)
    lses = torch.empty(sets, kept, group // per, 2, dtype=torch.float32, device=q.device)
    to = (out.stride(0), out.stride(1), out.stride(2), lse.stride(0), lse.stride(1))
    dims = max(_rt.MIN_DOT, triton.next_power_of_2(width))
    _attend_kernel[(sets, splits)](
        q, k, v, table, seen.lens, seen.start, seen.states, chosen, count, out, lse, outs, lses,
        kv_heads, queries, room, group, width, k.shape[2], 0 if table is None else table.stride(0),
        chosen.shape[1], per_split, splits, _rt.bucket(positions),
        *q.stride(), *k.stride(), *v.stride(), *to, scale, softcap or 1.0,
        PER=per, BLOCK=block, STARTS=seen.start is not None, MASKED=seen.states is not None, PAGED=table is not None,
        SOFTCAP=softcap is not None, FINAL=splits == 1, UPCAST=_rt.INTERPRET, GP=_rt.bucket(group // per), DP=dims,
    )  # fmt: skip
    if splits > 1:
        _merge_kernel[(sets, group // per)](
            outs, lses, out, lse, kv_heads, queries, group, width, splits, *to,
            PER=per, SPLITS=triton.next_power_of_2(splits), DP=dims,
        )  # fmt: skip
