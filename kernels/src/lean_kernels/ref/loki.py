"""Loki decode in plain torch: the path for CPUs, and the oracle of the Triton kernels in float64.

Few queries attend to the cached tokens whose keys match best in the leading `d` of D rotated dimensions ("Loki:
Low-rank Keys for Efficient Sparse Attention", arXiv 2406.02542, section 4). The work goes one KV head at a time: the
gathered rows then stay in the processor's caches, where one gather for the whole batch would go through memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .selection import Indices, Rule, Visible, pick

CHUNK = 2048  # rows gathered or converted at a time, about 1 MB: what a core's second cache holds
BAGS = 8  # up to this many query heads a weighted sum over rows in place is quicker than gathering them
NARROW = 4  # up to this many query heads a product is quicker with the keys on the left


class Plane:
    """Keys or values of one cache, contiguous [B, Hkv, cap, D] or paged [pages, Hkv, page, D] by `table` [B, maxp]."""

    def __init__(self, cache: Tensor, table: Tensor | None):
        self.cache, self.table = cache, table
        self.flat = None if table is None else cache.reshape(-1, cache.shape[-1])

    def rows(self, b: int, h: int, tokens: Indices) -> tuple[Tensor, Tensor]:
        """A matrix of rows, and the numbers of the rows in it that hold these tokens."""
        if self.table is None or self.flat is None:
            return self.cache[b, h], torch.from_numpy(tokens).to(self.cache.device)
        page = self.cache.shape[2]
        pages = self.table[b].cpu().numpy().astype(np.int64)[tokens // page]
        numbers = (pages * self.cache.shape[1] + h) * page + tokens % page
        return self.flat, torch.from_numpy(numbers).to(self.cache.device)

    def span(self, b: int, h: int, lo: int, hi: int, width: int) -> Tensor:
        """The first `width` dimensions of tokens lo to hi: [hi - lo, width], a view where the cache is contiguous."""
        if self.table is None:
            return self.cache[b, h, lo:hi, :width]
        matrix, numbers = self.rows(b, h, np.arange(lo, hi, dtype=np.int64))
        return matrix[:, :width].index_select(0, numbers)


def loki_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lens: Tensor,
    *,
    d: int,
    topk: int | Tensor,
    scale: float,
    select: str = "group",
    reduce: str = "softmax_mean",
    sink: int = 0,
    recent: int = 0,
    block: int = 1,
    block_table: Tensor | None = None,
    start: Tensor | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    mask: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """As `lean_kernels.loki_decode`, whose arguments it takes unchecked; float64 too."""
    rule = Rule(d, select, reduce, sink, recent, block)
    keys, values = Plane(k, block_table), Plane(v, block_table)
    out, lse = _results(q)
    for b, h, i, visible in _queries(q, k.shape[1], lens, start, mask):
        for heads, tokens in _chosen(q, keys, b, h, i, _per_row(topk, b), scale, rule, visible):
            out[b, heads, i], lse[b, heads, i] = _attend(q[b, heads, i], keys, values, b, h, tokens, scale, softcap)
    return (out, lse) if return_lse else out


def selected(
    q: Tensor,
    k: Tensor,
    lens: Tensor,
    *,
    d: int,
    topk: int | Tensor,
    scale: float,
    select: str = "group",
    reduce: str = "softmax_mean",
    sink: int = 0,
    recent: int = 0,
    block: int = 1,
    block_table: Tensor | None = None,
    start: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The tokens that `loki_decode` reads with these arguments, int64, ascending, filled up with -1.

    Shape [B, Hkv, Q, n] for `select="group"` and [B, Hq, Q, n] for "head", where n is the largest number chosen.
    """
    rule = Rule(d, select, reduce, sink, recent, block)
    keys = Plane(k, block_table)
    found: dict[tuple[int, int, int], Indices] = {}
    for b, h, i, visible in _queries(q, k.shape[1], lens, start, mask):
        for heads, tokens in _chosen(q, keys, b, h, i, _per_row(topk, b), scale, rule, visible):
            listed = np.arange(tokens.start, tokens.stop) if isinstance(tokens, slice) else tokens
            for head in [h] if select == "group" else range(heads.start, heads.stop):
                found[b, head, i] = listed
    sets = k.shape[1] if select == "group" else q.shape[1]
    width = max((len(tokens) for tokens in found.values()), default=0)
    result = torch.full((len(q), sets, q.shape[2], width), -1, dtype=torch.int64)
    for (b, head, i), tokens in found.items():
        result[b, head, i, : len(tokens)] = torch.from_numpy(tokens)
    return result.to(q.device)


def dense_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lens: Tensor,
    *,
    scale: float,
    block_table: Tensor | None = None,
    start: Tensor | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    mask: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of few queries to all visible tokens, a group's heads packed: as `loki_decode` without a rule."""
    keys, values = Plane(k, block_table), Plane(v, block_table)
    out, lse = _results(q)
    for b, h, i, visible in _queries(q, k.shape[1], lens, start, mask):
        heads = _heads(q, k, h)
        tokens = visible.all()
        out[b, heads, i], lse[b, heads, i] = _attend(q[b, heads, i], keys, values, b, h, tokens, scale, softcap)
    return (out, lse) if return_lse else out


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type that sums are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _results(q: Tensor) -> tuple[Tensor, Tensor]:
    """What a query that sees no token gets: output 0 and log-sum-exp -inf."""
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    return out, torch.full(q.shape[:3], -torch.inf, dtype=accumulator(q.dtype), device=q.device)


def _per_row(topk: int | Tensor, b: int) -> int:
    return int(topk[b]) if isinstance(topk, Tensor) and topk.ndim else int(topk)


def _heads(q: Tensor, cache: Tensor, h: int) -> slice:
    """The query heads that read KV head h."""
    group = q.shape[1] // cache.shape[1]
    return slice(h * group, (h + 1) * group)


def _queries(
    q: Tensor, kv_heads: int, lens: Tensor, start: Tensor | None, mask: Tensor | None
) -> Iterator[tuple[int, int, int, Visible]]:
    """Batch row, KV head, query and what it sees, for every query that sees any. A head's queries come in a run."""
    ends, queries = lens.tolist(), q.shape[2]
    starts = [0] * len(q) if start is None else start.tolist()
    for b in range(len(q)):
        seen = [_visible(b, i, starts[b], ends[b] - queries + 1 + i, mask) for i in range(queries)]
        for h in range(kv_heads):
            yield from ((b, h, i, visible) for i, visible in enumerate(seen) if len(visible))


def _visible(b: int, i: int, lo: int, hi: int, mask: Tensor | None) -> Visible:
    if mask is None or hi <= lo:
        return Visible(lo, max(lo, hi))
    hi = max(lo, min(hi, mask.shape[-1]))
    only = np.flatnonzero(mask[b, 0, i, lo:hi].cpu().numpy())
    return Visible(lo, hi) if len(only) == hi - lo else Visible(lo, hi, only)


def _chosen(
    q: Tensor, keys: Plane, b: int, h: int, i: int, topk: int, scale: float, rule: Rule, visible: Visible
) -> list[tuple[slice, Indices | slice]]:
    """Query heads and the tokens they read: one entry for the group of KV head h, or one for each query head."""
    heads = _heads(q, keys.cache, h)
    if max(topk, rule.sink + rule.recent) >= len(visible):
        return [(heads, visible.all())]
    scores = _low_scores(q[b, heads, i, : rule.d], keys.span(b, h, visible.lo, visible.hi, rule.d), scale)
    sets = pick(scores, topk, rule, visible)
    if rule.select == "group":
        return [(heads, sets[0])]
    return [(slice(head, head + 1), tokens) for head, tokens in zip(range(heads.start, heads.stop), sets)]


def _low_scores(q: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Scaled products [G, S]. They only rank: of many bfloat16 keys they are rounded, conversions cost more."""
    if q.dtype == torch.bfloat16 and len(keys) > CHUNK and not q.is_cuda:
        return (q @ keys.T).float().mul_(scale)
    return _logits(q.to(accumulator(q.dtype)) * scale, keys, None)


def _logits(q: Tensor, matrix: Tensor, rows: Tensor | None) -> Tensor:
    """q [R, D] times rows of a matrix (all of them for None): [R, n] in q's type."""
    if rows is None and matrix.dtype == q.dtype:
        narrow = 1 < len(q) <= NARROW and matrix.is_contiguous()
        return (matrix @ q.T).T.contiguous() if narrow else q @ matrix.T
    total = len(matrix) if rows is None else len(rows)
    logits = torch.empty(len(q), total, dtype=q.dtype, device=q.device)
    for at, part in _parts(matrix, rows, q.dtype):
        torch.mm(q, part.T, out=logits[:, at : at + len(part)])
    return logits


def _weighted(weights: Tensor, matrix: Tensor, rows: Tensor | None) -> Tensor:
    """weights [R, n] times rows of a matrix (all of them for None): [R, D] in the weights' type."""
    if rows is None and (matrix.dtype == weights.dtype or matrix.dtype == torch.bfloat16):
        return (weights.to(matrix.dtype) @ matrix).to(weights.dtype)
    if rows is not None and len(weights) <= BAGS and matrix.is_contiguous():
        # sums rows where they lie; a gather would write them and read them again
        offsets = torch.arange(0, weights.numel(), len(rows), device=rows.device)
        flat = weights.to(matrix.dtype).flatten()
        return torch.embedding_bag(matrix, rows.repeat(len(weights)), offsets, False, 0, False, flat)[0]
    result = torch.zeros(len(weights), matrix.shape[1], dtype=weights.dtype, device=weights.device)
    for at, part in _parts(matrix, rows, weights.dtype):
        result.addmm_(weights[:, at : at + len(part)], part)
    return result


def _parts(matrix: Tensor, rows: Tensor | None, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Where a part begins and its rows, gathered and converted. A part lives until the next."""
    total = len(matrix) if rows is None else len(rows)
    size = max(1, min(CHUNK, total))
    # rows are packed before a conversion, which is slow over short rows with gaps between them
    packed = None if rows is not None or matrix.is_contiguous() else matrix.new_empty(size, matrix.shape[1])
    single = torch.arange(size, device=matrix.device)
    converted = None if matrix.dtype == dtype else matrix.new_empty(size, matrix.shape[1], dtype=dtype)
    for at in range(0, total, size):
        n = min(size, total - at)
        if rows is not None and not matrix.is_contiguous():
            part = matrix.index_select(0, rows[at : at + n])
        elif rows is not None:
            # a gather as sums over single rows, which fetches rows ahead; index_select waits for each
            part = torch.embedding_bag(matrix, rows[at : at + n], single[:n], False, 0, False)[0]
        else:
            part = matrix[at : at + n] if packed is None else packed[:n].copy_(matrix[at : at + n])
        yield at, part if converted is None else converted[:n].copy_(part)


def _attend(
    q: Tensor, keys: Plane, values: Plane, b: int, h: int, tokens: Indices | slice, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Attention of q [R, D] to tokens of one KV head: output [R, D] and log-sum-exp [R]."""
    if isinstance(tokens, slice):
        width = q.shape[-1]
        matrix, rows = keys.span(b, h, tokens.start, tokens.stop, width), None
        others = values.span(b, h, tokens.start, tokens.stop, width)
    else:
        matrix, rows = keys.rows(b, h, tokens)
        others = values.rows(b, h, tokens)[0]
    logits = _logits(q.to(accumulator(q.dtype)) * scale, matrix, rows)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    weights = logits.softmax(-1)
    # the greatest weight is exp(greatest logit - log-sum-exp)
    return _weighted(weights, others, rows), logits.amax(-1) - weights.amax(-1).log()
