"""Selection for `lean_kernels.ops.loki`: the best scored tokens or blocks of each set, ascending, by radix select.

A score becomes a 32 bit number that orders as the score does: 0 for a token that is not visible, the greatest for one
that is always read. Four passes over 8 bits each find the smallest number that is chosen; of tokens that have just
this number the lowest are taken. Sets of up to `ONE_PROGRAM` tokens take one launch, longer ones five.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lean_kernels import _rt

ONE_PROGRAM = 8192  # tokens
LOWEST = tl.constexpr(-1e38)  # below every maximum, and finite: differences with it are no NaN
FORCED = tl.constexpr(0xFFFFFFFF)


@triton.jit
def set_of(s, per: tl.constexpr, kv_heads, queries):
    """Batch row, KV head, query and head within the group of set s, which runs over [B, Hkv, Q, per]."""
    base = s // per
    return base // (kv_heads * queries), (base // queries) % kv_heads, base % queries, s % per


@triton.jit
def span_of(lens, start, b, i, queries, STARTS: tl.constexpr):
    """First visible token of query i in row b and the one after the last."""
    hi = tl.load(lens + b).to(tl.int32) - queries + 1 + i
    lo = hi * 0
    if STARTS:
        lo = tl.load(start + b).to(tl.int32)
    return lo, hi


@triton.jit
def seen_of(token, lo, hi, states, b, i, queries, S, MASKED: tl.constexpr):
    """Which of these tokens are visible."""
    seen = (token >= lo) & (token < hi)
    if MASKED:
        seen &= tl.load(states + (b * queries + i).to(tl.int64) * S + token, mask=seen, other=0) != 0
    return seen


@triton.jit
def _count(
    topk, topk_rows, counts, b, i, queries, lo, hi, sink, recent,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """How many tokens or blocks are chosen."""
    if MASKED:
        return tl.load(counts + b * queries + i)
    else:
        n = tl.maximum(hi - lo, 0)
        k = topk
        if ROWS:
            k = tl.load(topk_rows + b).to(tl.int32)
        k = tl.minimum(tl.maximum(k, sink + recent), n)
        if BLOCK > 1:
            first, last = lo // BLOCK, (hi - 1) // BLOCK
            forced = tl.where(sink > 0, (tl.minimum(lo + sink, hi) - 1) // BLOCK - first + 1, 0)
            forced += tl.where(recent > 0, last - tl.maximum(hi - recent, lo) // BLOCK + 1, 0)
            blocks = tl.minimum(tl.maximum((k + BLOCK - 1) // BLOCK, forced), last - first + 1)
            blocks = tl.where(k < n, blocks, last - first + 1)  # all tokens may lie in one block more than they fill
            k = tl.where(n > 0, blocks, 0)
        return k


@triton.jit
def _keys(
    scores, tops, sums, states, s, b, i, lo, hi, first, queries, group, S, tiles, sink, recent,
    MEAN: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr, BS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Ordered 32 bit numbers [BS / BLOCK] of the tokens or blocks from token `first` on."""
    token = first + tl.arange(0, BS)
    seen = seen_of(token, lo, hi, states, b, i, queries, S, MASKED)
    if MEAN:
        x = tl.zeros((BS,), tl.float32)
        best = tl.full((BS,), -float("inf"), tl.float32)
        tile = tl.arange(0, TILES)
        for g in range(group):
            row = (s * group + g).to(tl.int64)
            top = tl.load(tops + row * tiles + tile, mask=tile < tiles, other=LOWEST)
            part = tl.load(sums + row * tiles + tile, mask=tile < tiles, other=0.0)
            greatest = tl.max(top, 0)
            total = tl.sum(part * tl.exp(top - greatest), 0)
            a = tl.load(scores + row * S + token, mask=seen, other=-float("inf"))
            x += tl.exp(a - greatest) / tl.where(total > 0, total, 1.0)
            best = tl.maximum(best, a)
        x = tl.where(best == -float("inf"), best, x)
    else:
        x = tl.load(scores + s.to(tl.int64) * S + token, mask=seen, other=-float("inf"))
    bits = tl.where(x == 0, 0.0, x).to(tl.uint32, bitcast=True)  # -0 equals 0
    key = tl.where((bits >> 31) != 0, bits ^ FORCED, bits | 0x80000000)
    if MASKED:
        forced = tl.load(states + (b * queries + i).to(tl.int64) * S + token, mask=seen, other=0) == 2
    else:
        forced = (token < lo + sink) | (token >= hi - recent)
    key = tl.where(forced, FORCED, key)
    key = tl.where(seen, key, 0).to(tl.uint32)
    if BLOCK > 1:
        key = tl.max(tl.reshape(key, (BS // BLOCK, BLOCK)), 1)
    return key


@triton.jit
def _digit(histogram, wanted):
    """The digit of the wanted-th greatest number, and how many are still wanted of those that share it."""
    from_here = tl.sum(histogram, 0) - tl.cumsum(histogram, 0) + histogram
    digit = tl.sum((from_here >= wanted).to(tl.int32), 0) - 1
    greater = tl.sum(tl.where(tl.arange(0, 256) > digit, histogram, 0), 0)
    return digit, wanted - greater


@triton.jit
def _small_kernel(
    scores, tops, sums, states, lens, start, topk_rows, counts, chosen, count,
    topk, kv_heads, queries, group, S, tiles, sink, recent, width,
    PER: tl.constexpr, MEAN: tl.constexpr, STARTS: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr,
    BLOCK: tl.constexpr, BS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """One program a set, all its numbers in registers."""
    s = tl.program_id(0)
    b, _h, i, _g = set_of(s, PER, kv_heads, queries)
    lo, hi = span_of(lens, start, b, i, queries, STARTS)
    wanted = _count(topk, topk_rows, counts, b, i, queries, lo, hi, sink, recent, BLOCK, ROWS, MASKED)
    tl.store(count + s, wanted)
    key = _keys(
        scores, tops, sums, states, s, b, i, lo, hi, 0, queries, group, S, tiles, sink, recent,
        MEAN, MASKED, BLOCK, BS, TILES,
    )  # fmt: skip
    left = wanted
    match = key >= 0
    threshold = tl.zeros((1,), tl.uint32)
    for step in tl.static_range(4):
        digits = ((key >> (24 - 8 * step)) & 255).to(tl.int32)
        digit, left = _digit(tl.histogram(digits, 256, mask=match), left)
        threshold = threshold | (digit.to(tl.uint32) << (24 - 8 * step))
        match = match & (digits == digit)
    equal = (key == threshold).to(tl.int32)
    taken = (key > threshold) | ((equal > 0) & (tl.cumsum(equal, 0) <= left))
    place = tl.cumsum(taken.to(tl.int32), 0) - 1
    unit = tl.arange(0, BS // BLOCK)
    tl.store(chosen + s.to(tl.int64) * width + place, unit, mask=taken & (place < wanted))


@triton.jit
def _keys_kernel(
    scores, tops, sums, states, lens, start, topk_rows, counts, keys, histograms, count,
    topk, kv_heads, queries, group, S, tiles, sink, recent, units, parts,
    PER: tl.constexpr, MEAN: tl.constexpr, STARTS: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr,
    BLOCK: tl.constexpr, BS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The numbers of one part of a set, and how often each first digit comes."""
    s, part = tl.program_id(0), tl.program_id(1)
    b, _h, i, _g = set_of(s, PER, kv_heads, queries)
    lo, hi = span_of(lens, start, b, i, queries, STARTS)
    if part == 0:
        wanted = _count(topk, topk_rows, counts, b, i, queries, lo, hi, sink, recent, BLOCK, ROWS, MASKED)
        tl.store(count + s, wanted)
    key = _keys(
        scores, tops, sums, states, s, b, i, lo, hi, part * BS, queries, group, S, tiles, sink, recent,
        MEAN, MASKED, BLOCK, BS, TILES,
    )  # fmt: skip
    unit = part * (BS // BLOCK) + tl.arange(0, BS // BLOCK)
    tl.store(keys + s.to(tl.int64) * units + unit, key.to(tl.int32, bitcast=True), mask=unit < units)
    histogram = tl.histogram((key >> 24).to(tl.int32), 256)
    tl.store(histograms + (s * parts + part).to(tl.int64) * 256 + tl.arange(0, 256), histogram)


@triton.jit
def _parts_of(histograms, s, step, sets, parts, PARTS: tl.constexpr):
    """The histograms [PARTS, 256] of a set's parts in one pass."""
    part = tl.arange(0, PARTS)
    at = ((step * sets + s) * parts + part).to(tl.int64)[:, None] * 256 + tl.arange(0, 256)[None, :]
    return tl.load(histograms + at, mask=(part < parts)[:, None], other=0)


@triton.jit
def _state_of(state, count, s, step, sets, FIRST: tl.constexpr):
    """The digits found before pass `step`, as a 32 bit number, and how many are wanted of the numbers with these."""
    if FIRST:
        left = tl.load(count + s)
        prefix = (left * 0).to(tl.uint32)
    else:
        prefix = tl.load(state + (step * sets + s) * 2).to(tl.uint32, bitcast=True)
        left = tl.load(state + (step * sets + s) * 2 + 1)
    return prefix, left


@triton.jit
def _pass_kernel(
    keys, histograms, count, state, sets, units, parts,
    STEP: tl.constexpr, PARTS: tl.constexpr, BU: tl.constexpr,
):  # fmt: skip
    """Finds the digit that pass STEP - 1 counted, and counts the next digit of the numbers that share it."""
    s, part = tl.program_id(0), tl.program_id(1)
    prefix, left = _state_of(state, count, s, STEP - 1, sets, STEP == 1)
    digit, left = _digit(tl.sum(_parts_of(histograms, s, STEP - 1, sets, parts, PARTS), 0), left)
    prefix = prefix | (digit.to(tl.uint32) << (32 - 8 * STEP))
    if part == 0:
        tl.store(state + (STEP * sets + s) * 2, prefix.to(tl.int32, bitcast=True))
        tl.store(state + (STEP * sets + s) * 2 + 1, left)
    unit = part * BU + tl.arange(0, BU)
    key = tl.load(keys + s.to(tl.int64) * units + unit, mask=unit < units, other=0).to(tl.uint32, bitcast=True)
    match = (key >> (32 - 8 * STEP)) == (prefix >> (32 - 8 * STEP))
    histogram = tl.histogram(((key >> (24 - 8 * STEP)) & 255).to(tl.int32), 256, mask=match)
    at = ((STEP * sets + s) * parts + part).to(tl.int64) * 256
    tl.store(histograms + at + tl.arange(0, 256), histogram)


@triton.jit
def _write_kernel(
    keys, histograms, count, state, chosen, sets, units, parts, width, PARTS: tl.constexpr, BU: tl.constexpr
):  # fmt: skip
    """Writes the chosen units of one part behind those of the parts before it."""
    s, part = tl.program_id(0), tl.program_id(1)
    prefix, left = _state_of(state, count, s, 3, sets, False)
    last = _parts_of(histograms, s, 3, sets, parts, PARTS)
    digit, left = _digit(tl.sum(last, 0), left)
    threshold = prefix | digit.to(tl.uint32)
    before = (tl.arange(0, PARTS) < part)[:, None]
    value = tl.arange(0, 256)[None, :]
    greater = part * 0
    for step in tl.static_range(4):
        own = ((threshold >> (24 - 8 * step)) & 255).to(tl.int32)
        histogram = _parts_of(histograms, s, step, sets, parts, PARTS)
        greater += tl.sum(tl.sum(tl.where(before & (value > own), histogram, 0), 1), 0)
    ties = tl.sum(tl.sum(tl.where(before & (value == digit), last, 0), 1), 0)
    unit = part * BU + tl.arange(0, BU)
    key = tl.load(keys + s.to(tl.int64) * units + unit, mask=unit < units, other=0).to(tl.uint32, bitcast=True)
    equal = (key == threshold).to(tl.int32)
    taken = (key > threshold) | ((equal > 0) & (ties + tl.cumsum(equal, 0) <= left))
    place = greater + tl.minimum(ties, left) + tl.cumsum(taken.to(tl.int32), 0) - 1
    tl.store(chosen + s.to(tl.int64) * width + place, unit, mask=taken & (place < tl.load(count + s)))


@dataclass(frozen=True)
class Visibility:
    """What the kernels need to tell visible tokens: per row, or per query and token where a mask is given."""

    lens: Tensor
    start: Tensor | None
    states: Tensor | None  # int8 [B, Q, S]: 0 not visible, 1 visible, 2 always read
    counts: Tensor | None  # int32 [B, Q]: units chosen, with `states`


@dataclass(frozen=True)
class Scored:
    """Scores [rows, S] float32, rows over [B, Hkv, Q, heads kept], and the tiles' maxima and sums of exp for a mean."""

    scores: Tensor
    tops: Tensor
    sums: Tensor
    tiles: int
    mean: bool
    per: int  # sets for one KV head and query
    group: int


def choose(
    scored: Scored,
    seen: Visibility,
    *,
    sets: int,
    kv_heads: int,
    queries: int,
    topk: int,
    topk_rows: Tensor | None,
    sink: int,
    recent: int,
    block: int,
    width: int,
    one_program: int = ONE_PROGRAM,
) -> tuple[Tensor, Tensor]:
    """Chosen units int32 [sets, width], ascending, and their number [sets]; what lies behind it is undefined."""
    tokens, device = scored.scores.shape[-1], seen.lens.device
    chosen = torch.empty(sets, width, dtype=torch.int32, device=device)
    count = torch.empty(sets, dtype=torch.int32, device=device)
    inputs = (
        scored.scores, scored.tops, scored.sums, seen.states, seen.lens, seen.start, topk_rows, seen.counts
    )  # fmt: skip
    sizes = (topk, kv_heads, queries, scored.group, tokens, scored.tiles, sink, recent)
    flags = {
        "PER": scored.per,
        "MEAN": scored.mean,
        "STARTS": seen.start is not None,
        "ROWS": topk_rows is not None,
        "MASKED": seen.states is not None,
        "BLOCK": block,
        "TILES": triton.next_power_of_2(scored.tiles),
    }
    if tokens <= one_program:
        size = max(_rt.bucket(tokens), block)
        _small_kernel[(sets,)](*inputs, chosen, count, *sizes, width, **flags, BS=size, num_warps=8)
        return chosen, count
    part = max(one_program // 4, triton.next_power_of_2(triton.cdiv(tokens, 64)), block)
    parts, units = triton.cdiv(tokens, part), triton.cdiv(tokens, block)
    keys = torch.empty(sets, units, dtype=torch.int32, device=device)
    histograms = torch.empty(4, sets, parts, 256, dtype=torch.int32, device=device)
    state = torch.empty(4, sets, 2, dtype=torch.int32, device=device)
    grid = (sets, parts)
    _keys_kernel[grid](*inputs, keys, histograms, count, *sizes, units, parts, **flags, BS=part, num_warps=8)
    wide = {"PARTS": triton.next_power_of_2(parts), "BU": part // block, "num_warps": 8}
    for step in (1, 2, 3):
        _pass_kernel[grid](keys, histograms, count, state, sets, units, parts, STEP=step, **wide)
    _write_kernel[grid](keys, histograms, count, state, chosen, sets, units, parts, width, **wide)
    return chosen, count
