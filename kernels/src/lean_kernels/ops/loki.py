"""`loki_decode`: attention of few queries to the cached tokens that match best in the leading rotated dimensions."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from lean_kernels import _rt, native
from lean_kernels.ref import loki as ref

MAX_QUERIES = 8
SELECT = ("group", "head")
REDUCE = ("softmax_mean", "max")
BLOCKS = (1, 16, 32, 64)


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
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Loki's sparse attention for decoding (arXiv 2406.02542, section 4), exact over the tokens it selects.

    Args:
        q: queries [B, Hq, Q, D], Q <= 8, rotated into the basis of the keys' principal components.
        k, v: the cache, its keys rotated, [B, Hkv, capacity, D] in any strides or, with `block_table`,
            [pages, Hkv, page, D].
        lens: [B] integers. Row b holds the tokens start[b] <= j < lens[b], of which query i of Q (the last Q tokens)
            sees j < lens[b] - Q + 1 + i. A query that sees none gets 0 and log-sum-exp -inf.
        d: leading dimensions that a token's score is computed from, 1 to D.
        topk: tokens that a query reads, one number or [B] integers; at least sink + recent. All, if it sees no more.
        scale: factor of the products q·k, for the whole width D.
        select: "group" picks one set for the query heads of a KV head, "head" one for each query head.
        reduce: a group's score: "softmax_mean", the mean of the heads' softmax over visible tokens, or their "max".
        sink, recent: so many first and last visible tokens are always read, and count within topk.
        block: 1, or 16, 32, 64: whole aligned blocks are read, ceil(topk / block) of them, by the score of their best
            tokens.
        block_table: [B, n] integers: the pages of each row.
        start: [B] integers, the padding on the left of each row.
        softcap: logits become softcap·tanh(logits / softcap); it does not enter the selection.
        return_lse: also give the natural log-sum-exp of the logits, float32 [B, Hq, Q] (float64 for float64).
        mask: bool [B, 1, Q, S], True where a token may be seen, besides what lens and start say.
        backend: "auto", "torch", "triton", or "native", which is C on a CPU (see `lean_kernels.native`).

    Returns:
        [B, Hq, Q, D] in q's dtype, or that and the log-sum-exp.

    Ties go to the lowest token. A NaN score counts as -inf. In plain torch on a CPU the scores of more than 2048
    bfloat16 keys are rounded to bfloat16.

    Raises:
        ValueError, TypeError: for shapes, types and settings that do not fit, naming the argument.
        IndexError: for a page that block_table names and the cache has not (a GPU looks with LEAN_KERNELS_DEBUG=1).
        RuntimeError: for tensors on different devices.
    """
    rows = topk if isinstance(topk, Tensor) and topk.ndim else None
    _check_cache(q, k, v, block_table, d)
    _check_rows(q, k, lens=lens, start=start, topk=rows, mask=mask)
    _check_rule(1 if rows is not None else int(topk), scale, select, reduce, sink, recent, block, softcap)
    _rt.same_device(q=q, k=k, v=v, lens=lens, topk=rows, block_table=block_table, start=start, mask=mask)
    most = 0 if rows is not None else int(topk)
    out, lse = _loki_decode(
        q, k, v, lens, rows, block_table, start, mask,
        d, most, float(scale), select, reduce, sink, recent, block, softcap, backend,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def dense_decode(
    q: Tensor, k: Tensor, v: Tensor, lens: Tensor, *, scale: float, start: Tensor | None = None,
    softcap: float | None = None, mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of few queries to all visible tokens on a CPU, the arguments as `loki_decode`'s, unchecked."""
    if _in_c("auto", mask is None and native.takes(q, k, v)):
        return native.loki_decode(q, k, v, lens, d=1, topk=k.shape[2], scale=scale, start=start, softcap=softcap)[0]
    out = ref.dense_decode(q, k, v, lens, scale=scale, start=start, softcap=softcap, mask=mask)
    assert isinstance(out, Tensor)  # no log-sum-exp was asked for
    return out


@torch.library.custom_op("lean_kernels::loki_decode", mutates_args=())
def _loki_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lens: Tensor,
    topk_rows: Tensor | None,
    block_table: Tensor | None,
    start: Tensor | None,
    mask: Tensor | None,
    d: int,
    topk: int,
    scale: float,
    select: str,
    reduce: str,
    sink: int,
    recent: int,
    block: int,
    softcap: float | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`topk_rows` instead of `topk` if given."""
    _check_values(k, lens, topk_rows, block_table, start)
    plain = block_table is None and mask is None and block == 1
    if _in_c(backend, plain and native.takes(q, k, v)):
        return native.loki_decode(
            q, k, v, lens, d=d, topk=topk if topk_rows is None else topk_rows, scale=scale, select=select,
            reduce=reduce, sink=sink, recent=recent, start=start, softcap=softcap,
        )  # fmt: skip
    decode = ref.loki_decode if _rt.choose(backend, q) == "torch" else _rt.kernels("loki").loki_decode
    out, lse = decode(
        q, k, v, lens, d=d, topk=topk if topk_rows is None else topk_rows, scale=scale, select=select, reduce=reduce,
        sink=sink, recent=recent, block=block, block_table=block_table, start=start, softcap=softcap,
        return_lse=True, mask=mask,
    )  # fmt: skip
    return out, lse


def _in_c(backend: str, able: bool) -> bool:
    """Whether C does it: where it is asked for, and where it is able to and nothing else is asked for."""
    if backend == "native" and not able:
        raise RuntimeError(
            "backend 'native' takes float32 or bfloat16 on a CPU, rows of a multiple of 8 numbers, no pages, blocks "
            "or mask, and needs a C compiler once; use backend 'torch'"
        )
    if backend == "auto":
        backend = os.environ.get("LEAN_KERNELS_BACKEND", "auto")
    return able and backend in ("auto", "native")


@_loki_decode.register_fake
def _(q: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=ref.accumulator(q.dtype))


def _capacity(k: Tensor, block_table: Tensor | None) -> int:
    """Tokens that a row of the cache can hold."""
    return k.shape[2] if block_table is None else block_table.shape[1] * k.shape[2]


def _check_cache(q: Tensor, k: Tensor, v: Tensor, block_table: Tensor | None, d: int) -> None:
    if not q.is_floating_point():
        raise TypeError(f"q is {q.dtype}; it must be float16, bfloat16, float32 or float64")
    for name, cache in (("k", k), ("v", v)):
        if cache.dtype != q.dtype:
            raise TypeError(f"{name} is {cache.dtype}, but q is {q.dtype}; give them one dtype")
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} must have four dimensions: [B, heads, tokens, D]")
    rows, heads, queries, width = q.shape
    if not 1 <= queries <= MAX_QUERIES:
        raise ValueError(f"q holds {queries} queries a row; give 1 to {MAX_QUERIES}, longer prompts are dense")
    if k.shape[3] != width or k.shape[1] < 1 or heads % k.shape[1]:
        raise ValueError(f"k {tuple(k.shape)} does not fit q {tuple(q.shape)}: same D, and Hkv divides Hq")
    if v.shape != k.shape:
        raise ValueError(f"v is {tuple(v.shape)}, but k is {tuple(k.shape)}; they must be alike")
    if block_table is None and k.shape[0] != rows:
        raise ValueError(f"k has {k.shape[0]} rows, but q has {rows}; a paged cache needs block_table")
    if block_table is not None and (block_table.ndim != 2 or block_table.shape[0] != rows):
        raise ValueError(f"block_table is {tuple(block_table.shape)}; it must be [{rows}, pages a row]")
    if not 1 <= d <= width:
        raise ValueError(f"d is {d}; it must be 1 to the head width D = {width}")


def _check_rows(
    q: Tensor, k: Tensor, *, lens: Tensor, start: Tensor | None, topk: Tensor | None, mask: Tensor | None
) -> None:
    for name, numbers in (("lens", lens), ("start", start), ("topk", topk)):
        if numbers is None:
            continue
        if numbers.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} is {numbers.dtype}; it must be int32 or int64")
        if tuple(numbers.shape) != (q.shape[0],):
            raise ValueError(f"{name} is {tuple(numbers.shape)}; it must hold one number a row: [{q.shape[0]}]")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask is {mask.dtype}; it must be bool, True where a token may be seen")
    if mask is not None and (mask.ndim != 4 or tuple(mask.shape[:3]) != (q.shape[0], 1, q.shape[2])):
        raise ValueError(f"mask is {tuple(mask.shape)}; it must be [{q.shape[0]}, 1, {q.shape[2]}, tokens]")


def _check_rule(
    topk: int, scale: float, select: str, reduce: str, sink: int, recent: int, block: int, softcap: float | None
) -> None:
    if topk < 1:
        raise ValueError(f"topk is {topk}; a query must read at least 1 token")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale is {scale}; it must be positive, usually 1/sqrt(D)")
    for name, given, accepted in (("select", select, SELECT), ("reduce", reduce, REDUCE), ("block", block, BLOCKS)):
        if given not in accepted:
            raise ValueError(f"{name} is {given!r}; it must be one of {', '.join(map(str, accepted))}")
    for name, number in (("sink", sink), ("recent", recent)):
        if number < 0:
            raise ValueError(f"{name} is {number}; it must be 0 or more tokens")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; it must be positive, or None for no cap")


def _check_values(
    k: Tensor, lens: Tensor, topk: Tensor | None, block_table: Tensor | None, start: Tensor | None
) -> None:
    if not lens.numel() or not _rt.checks_indices(lens):
        return
    room, longest = _capacity(k, block_table), int(lens.max())
    if longest > room or int(lens.min()) < 0:
        raise ValueError(f"lens are {lens.tolist()}; they must be 0 to the cache's capacity of {room} tokens")
    if start is not None and int(start.min()) < 0:
        raise ValueError(f"start is {start.tolist()}; it must be 0 or more in each row")
    if topk is not None and int(topk.min()) < 1:
        raise ValueError(f"topk is {topk.tolist()}; a query must read at least 1 token")
    if block_table is None:
        return
    used = torch.arange(block_table.shape[1], device=lens.device) * k.shape[2] < lens[:, None]
    bad = used & ((block_table < 0) | (block_table >= k.shape[0]))
    if bool(bad.any()):
        row, place = (int(n) for n in bad.nonzero()[0])
        page = int(block_table[row, place])
        raise IndexError(f"block_table[{row}, {place}] is {page}; the cache has the pages 0 to {k.shape[0] - 1}")
