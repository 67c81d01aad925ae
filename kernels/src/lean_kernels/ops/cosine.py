"""Cosine similarities of hidden-state streams, for the importance (1 - mean cosine) of layers and runs of layers.

A token whose vector is zero in one of two streams has no cosine: it adds 0 to the sum, is left out of `count`, and is
counted in `excluded`. (`torch.nn.functional.cosine_similarity` gives it 0 by way of its eps and counts it; its mean is
sum / (count + excluded).) Squares are summed in float32, so half-precision streams may hold any value, and vectors
shorter than 1e-19 count as zero. NaN and infinity give NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lean_kernels import _rt
from lean_kernels.ref import cosine as ref


class Cosines(NamedTuple):
    """Cosines summed over tokens.

    Args:
        sum: float64; a scalar for two streams, [Lp - 1] for adjacent pairs, [Lp, Lp] for all pairs.
        count: tokens in the sum, int64, shaped as it.
        excluded: unmasked tokens that are zero in one of the two streams, int64, shaped as the sum.
        per_token: each token's cosine, [..., T] float32 (float64 for float64 streams), 0 where masked or excluded;
            None unless asked for.
    """

    sum: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, of no use here
    excluded: Tensor
    per_token: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        """Mean cosine, float64, shaped as the sum; NaN where nothing was counted."""
        return self.sum / self.count


def cosine_stream(
    x: Tensor, y: Tensor, mask: Tensor | None = None, *, per_token: bool = False, backend: str = "auto"
) -> Cosines:
    """Cosine of x[t] and y[t], summed over tokens.

    Args:
        x, y: two streams, [..., H] with any leading dimensions, of one floating dtype.
        mask: bool or integer, shaped as x without H; False or 0 on tokens to leave out.
        per_token: also give each token's cosine.

    Raises:
        ValueError: shapes that do not match, no token, or a mask without one (seen on a CPU; on a GPU with
            LEAN_KERNELS_DEBUG=1, where the count is 0 otherwise).
        TypeError: a dtype that is not accepted.
    """
    if x.shape != y.shape:
        raise ValueError(f"x is {list(x.shape)} and y is {list(y.shape)}; the streams must have one shape")
    if x.dtype != y.dtype:
        raise TypeError(f"x is {x.dtype} and y is {y.dtype}; convert one of them")
    lead = x.shape[:-1]
    _check(x, lead, mask, at_least=1, y=y)
    rows = _flat(mask)
    cos, zero = _cosine_stream(x.reshape(-1, x.shape[-1]), y.reshape(-1, x.shape[-1]), rows, backend)
    return _sums(cos, zero, rows, cos.view(lead) if per_token else None)


def cosine_adjacent(
    x: Tensor, mask: Tensor | None = None, *, per_token: bool = False, backend: str = "auto"
) -> Cosines:
    """Cosine of x[l, t] and x[l + 1, t], summed over tokens, for all adjacent pairs of Lp streams in one read.

    Args, Raises: as `cosine_stream`; x is [Lp, ..., H] with Lp >= 2, the mask is shaped as one stream without H.
    """
    _check(x, x.shape[1:-1], mask, at_least=2)
    rows = _flat(mask)
    cos, zero = _cosine_adjacent(x.reshape(x.shape[0], -1, x.shape[-1]), rows, backend)
    return _sums(cos, zero, rows, cos.view(x.shape[0] - 1, *x.shape[1:-1]) if per_token else None)


def cosine_gram(x: Tensor, mask: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Mean over tokens of the cosines of all pairs of streams, [Lp, Lp] float64; NaN where a pair has no token.

    Args, Raises: as `cosine_stream`; x is [Lp, ..., H], the mask is shaped as one stream without H.
    """
    return _gram_sums(x, mask, backend=backend).mean


def _gram_sums(x: Tensor, mask: Tensor | None = None, *, backend: str = "auto") -> Cosines:
    """As `cosine_gram`, before the division: what `CosineAccumulator` adds up."""
    _check(x, x.shape[1:-1], mask, at_least=1)
    rows = _flat(mask)
    streams = x.reshape(x.shape[0], -1, x.shape[-1])
    sums, count = _cosine_gram(streams, rows, backend)
    total = streams.shape[1] if rows is None else rows.sum()
    return Cosines(sums, count, total - count)


class CosineAccumulator:
    """Mean cosines of streams that come in pieces: only sums are kept, never hidden states.

    Sums are float64, so the result does not depend on how the tokens were cut (to about 1e-15), and accumulators of
    several processes merge.

    Args:
        kind: "stream" for `update(x, y, mask)`, "adjacent" or "gram" for `update(x, mask)`.
    """

    def __init__(self, kind: str = "stream", *, backend: str = "auto") -> None:
        if kind not in ("stream", "adjacent", "gram"):
            raise ValueError(f"unknown kind {kind!r}; it is one of stream, adjacent, gram")
        self.kind, self.backend = kind, backend
        self._sums: Cosines | None = None

    def update(self, *streams_and_mask: Tensor | None) -> None:
        """Add tokens: takes the arguments of `cosine_stream`, `cosine_adjacent` or `cosine_gram`, and keeps none."""
        with torch.no_grad():
            if self.kind == "stream":
                self._add(cosine_stream(*streams_and_mask, backend=self.backend))  # type: ignore[arg-type]
            elif self.kind == "adjacent":
                self._add(cosine_adjacent(*streams_and_mask, backend=self.backend))  # type: ignore[arg-type]
            else:
                self._add(_gram_sums(*streams_and_mask, backend=self.backend))  # type: ignore[arg-type]

    def merge(self, other: CosineAccumulator) -> None:
        """Add what another accumulator of the same kind and number of streams has counted. Raises ValueError."""
        if other.kind != self.kind:
            raise ValueError(f"an accumulator of kind {other.kind!r} cannot be merged into one of kind {self.kind!r}")
        if other._sums is not None:
            self._add(other._sums)

    def result(self) -> Cosines:
        """Sums, counts and mean of everything so far. Raises ValueError if no token was counted."""
        if self._sums is None or not bool((self._sums.count + self._sums.excluded).any()):
            raise ValueError("no token has been counted: call update() with at least one unmasked token first")
        return self._sums

    def _add(self, new: Cosines) -> None:
        if self._sums is None:
            self._sums = new._replace(per_token=None)
            return
        old = self._sums
        if old.sum.shape != new.sum.shape:
            raise ValueError(
                f"another number of streams: sums are {list(new.sum.shape)} here and {list(old.sum.shape)} so far"
            )
        count, excluded = new.count.to(old.count.device), new.excluded.to(old.count.device)
        self._sums = Cosines(old.sum + new.sum.to(old.sum.device), old.count + count, old.excluded + excluded)


def _sums(cos: Tensor, zero: Tensor, mask: Tensor | None, per_token: Tensor | None) -> Cosines:
    excluded = zero.sum(-1)
    total = cos.shape[-1] if mask is None else mask.sum()
    return Cosines(cos.sum(-1, dtype=torch.float64), total - excluded, excluded, per_token)


def _flat(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.reshape(-1).to(torch.bool)


def _check(x: Tensor, lead: Sequence[int], mask: Tensor | None, at_least: int, **others: Tensor) -> None:
    needed = 2 if others else 3
    if x.dim() < needed:
        raise ValueError(f"x is {list(x.shape)}; streams of hidden states [..., H] are needed")
    if not others and x.shape[0] < at_least:
        raise ValueError(f"x holds {x.shape[0]} streams, [Lp, ..., H]; at least {at_least} are needed")
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}; hidden states are float32, float16, bfloat16 or float64")
    if x.numel() == 0:
        raise ValueError(f"x is {list(x.shape)}: there is no token to compare")
    _rt.same_device(x=x, mask=mask, **others)
    if mask is None:
        return
    if mask.is_floating_point():
        raise TypeError(f"mask is {mask.dtype}; it must be bool or an integer, 0 on tokens to leave out")
    if mask.shape != torch.Size(lead):
        raise ValueError(f"mask is {list(mask.shape)}; for x {list(x.shape)} it must be {list(lead)}")


def _check_mask(mask: Tensor | None) -> None:
    if mask is not None and _rt.checks_indices(mask) and not bool(mask.any()):
        raise ValueError("the mask leaves out every token; at least one must be True")


@torch.library.custom_op("lean_kernels::cosine_stream", mutates_args=())
def _cosine_stream(x: Tensor, y: Tensor, mask: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    _check_mask(mask)
    run = _rt.kernels("cosine") if _rt.choose(backend, x, y) == "triton" else ref
    cos, zero = run.cosine_stream(x, y, mask)
    return cos, zero


@_cosine_stream.register_fake
def _(x: Tensor, y: Tensor, mask: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], dtype=_cosine_dtype(x)), x.new_empty(x.shape[0], dtype=torch.bool)


@torch.library.custom_op("lean_kernels::cosine_adjacent", mutates_args=())
def _cosine_adjacent(x: Tensor, mask: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    _check_mask(mask)
    run = _rt.kernels("cosine") if _rt.choose(backend, x) == "triton" else ref
    cos, zero = run.cosine_adjacent(x, mask)
    return cos, zero


@_cosine_adjacent.register_fake
def _(x: Tensor, mask: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0] - 1, x.shape[1])
    return x.new_empty(shape, dtype=_cosine_dtype(x)), x.new_empty(shape, dtype=torch.bool)


@torch.library.custom_op("lean_kernels::cosine_gram", mutates_args=())
def _cosine_gram(x: Tensor, mask: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    _check_mask(mask)
    run = ref
    if _rt.choose(backend, x) == "triton" and x.shape[0] <= (kernels := _rt.kernels("cosine")).MAX_LAYERS:
        run = kernels
    sums, count = run.cosine_gram(x, mask)
    return sums, count


@_cosine_gram.register_fake
def _(x: Tensor, mask: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], x.shape[0])
    return x.new_empty(shape, dtype=torch.float64), x.new_empty(shape, dtype=torch.int64)


def _cosine_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
