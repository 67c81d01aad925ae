"""How alike two filter models rank the same records: rank correlation, overlap of the tops, each with an interval.

Superfiltering's claim is that a small model's scores order the records much as a large model's do (its tables of
Spearman's coefficients and of overlap ratios at 5, 10 and 15 %). Both are computed over the records that both models
scored, and bootstrapped over records.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from model_hooks import RequestError

from .selection import Share, as_scores, parse_share, ranked

SHARES = (0.05, 0.10, 0.15)
MEMORY = 2**20  # numbers in a block of resamples


@dataclass(frozen=True)
class Estimate:
    """A value with its percentile interval over bootstrap resamples; None where it is undefined or not resampled."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Overlap:
    """Of the top `share`: the records that both tops hold, as a part of the larger top. `chance`: of random tops."""

    share: float
    asked: int
    shared: int
    ratio: Estimate
    chance: float | None


@dataclass(frozen=True)
class LengthBin:
    """Agreement among the records whose length is within [low, high].

    overlaps: for each share, the part that both tops of the whole data have in common here.
    """

    low: float
    high: float
    records: int
    spearman: float | None
    overlaps: list[float | None]


@dataclass(frozen=True)
class Agreement:
    """Two score lists compared. `only_first` and `only_second` records have a score in one list alone."""

    records: int
    only_first: int
    only_second: int
    neither: int
    spearman: Estimate
    overlaps: list[Overlap]
    by_length: list[LengthBin]


def align(
    first_ids: Sequence[int | str], first: ArrayLike, second_ids: Sequence[int | str], second: ArrayLike
) -> tuple[list[int | str], NDArray[np.float64], NDArray[np.float64]]:
    """Two lists of scores by record id: all ids, those of the first in their order and then the rest of the second,
    and both scores of each, NaN where a list lacks it. Raises `RequestError` for an id that a list has twice."""
    columns = []
    for ids, scores in ((first_ids, as_scores(first)), (second_ids, as_scores(second))):
        if len(ids) != len(scores):
            raise RequestError(f"{len(ids)} ids for {len(scores)} scores; one for each record is needed")
        columns.append(found := dict(zip(ids, scores.tolist())))
        if len(found) < len(ids):
            seen: set[int | str] = set()
            twice = next(i for i in ids if i in seen or seen.add(i))  # type: ignore[func-returns-value]
            raise RequestError(f"id {twice!r} stands twice among the scores; records are compared by id")
    ids = list(columns[0] | columns[1])
    a, b = (np.array([column.get(i, math.nan) for i in ids]) for column in columns)
    return ids, a, b


def compare(
    first: ArrayLike,
    second: ArrayLike,
    *,
    ids: Sequence[int | str] | None = None,
    lengths: ArrayLike | None = None,
    shares: Sequence[Share] = SHARES,
    maximum: float | None = 1.0,
    bins: int = 5,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Agreement:
    """Compare two score lists over the same records (see `align`), NaN or None for none.

    Args:
        ids: for ties within a top, as in `superfiltering.select`.
        lengths: of each record, for the agreement within `bins` groups of rising length and about equal size.
        shares: of the records that both lists score, rounded down.
        maximum: a top holds scores below this only, as a selection does; None for no bound.
        resamples: bootstrap resamples of the records, seeded; 0 for none.

    Raises `RequestError` where no record has both scores, and for numbers out of range.
    """
    a, b = as_scores(first), as_scores(second)
    columns = {"second scores": b, "ids": ids, "lengths": lengths}
    for name, column in columns.items():
        if column is not None and len(np.asarray(column)) != len(a):
            raise RequestError(
                f"{len(np.asarray(column))} {name} for {len(a)} scores; lists of the same records are needed"
            )
    if resamples < 0 or not 0 < confidence < 1 or bins < 1:
        raise RequestError("resamples of at least 0, bins of at least 1 and a confidence within 0 and 1 are needed")
    in_a, in_b = np.isfinite(a), np.isfinite(b)
    both = np.flatnonzero(in_a & in_b)
    if not len(both):
        raise RequestError(f"none of {len(a)} records has both scores; compare scores of the same data")
    named = None if ids is None else [ids[k] for k in both.tolist()]
    exact = [parse_share(share) for share in shares]
    asked = [math.floor(share * len(both)) for share in exact]
    sides = [_Side(values[both], named, maximum) for values in (a, b)]
    drawn = _resample(sides[0], sides[1], asked, resamples, np.random.default_rng(seed))
    intervals = [_interval(column, (1 - confidence) / 2) for column in drawn.T]
    tops = [(sides[0].top(k), sides[1].top(k)) for k in asked]
    overlaps = [
        Overlap(float(share), k, int((one & other).sum()), Estimate(_ratio(one, other), *interval), k / len(both))
        for share, k, (one, other), interval in zip(exact, asked, tops, intervals[1:])
    ]
    by_length = []
    for part in [] if lengths is None else quantile_bins(within := np.asarray(lengths, np.float64)[both], bins):
        low, high = float(within[part].min()), float(within[part].max())
        ratios = [_ratio(one[part], other[part]) for one, other in tops]
        by_length.append(LengthBin(low, high, len(part), spearman(a[both][part], b[both][part]), ratios))
    return Agreement(
        records=len(both),
        only_first=int((in_a & ~in_b).sum()),
        only_second=int((in_b & ~in_a).sum()),
        neither=int((~in_a & ~in_b).sum()),
        spearman=Estimate(spearman(a[both], b[both]), *intervals[0]),
        overlaps=overlaps,
        by_length=by_length,
    )


class _Side:
    """One list of scores, sorted once: a resample of the records is then a weight for each, and sums over weights."""

    def __init__(self, scores: NDArray[np.float64], ids: Sequence[int | str] | None, maximum: float | None) -> None:
        within = np.flatnonzero(scores < (np.inf if maximum is None else maximum))
        self.falling = ranked(scores, within, ids)  # the order in which a selection takes them
        _, self.place, counts = np.unique(scores, return_inverse=True, return_counts=True)
        self.rising = np.argsort(scores, kind="stable")
        self.starts = np.cumsum(counts) - counts  # of each run of equal scores

    def top(self, k: int) -> NDArray[np.bool_]:
        """Which records are among the first `k`."""
        found = np.zeros(len(self.place), bool)
        found[self.falling[:k]] = True
        return found

    def midranks(self, weights: NDArray[np.int64]) -> NDArray[np.float64]:
        """[resamples, records]: ranks within each resample, in which a record occurs `weights` times."""
        runs = np.add.reduceat(weights[:, self.rising], self.starts, axis=1)
        return np.asarray((np.cumsum(runs, axis=1) - (runs - 1) / 2)[:, self.place])

    def tops(self, weights: NDArray[np.int64], k: int) -> NDArray[np.int64]:
        """[resamples, records]: how often each record is among the first `k` of each resample."""
        ordered = weights[:, self.falling]
        found = np.zeros_like(weights)
        found[:, self.falling] = np.clip(k - (np.cumsum(ordered, axis=1) - ordered), 0, ordered)
        return found


def _resample(
    one: _Side, other: _Side, asked: Sequence[int], resamples: int, draw: np.random.Generator
) -> NDArray[np.float64]:
    """[resamples, 1 + shares]: Spearman's coefficient and the overlaps; NaN where undefined."""
    n = len(one.place)
    found = np.full((resamples, 1 + len(asked)), np.nan)
    block = max(1, MEMORY // n)
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        records = draw.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
        weights = np.bincount(records.ravel(), minlength=rows * n).reshape(rows, n)
        part = found[start : start + rows]
        part[:, 0] = _weighted_correlation(one.midranks(weights), other.midranks(weights), weights)
        for column, k in enumerate(asked, 1):
            first, second = one.tops(weights, k), other.tops(weights, k)
            larger = np.maximum(first.sum(1), second.sum(1))
            np.divide(np.minimum(first, second).sum(1), larger, out=part[:, column], where=larger > 0)
    return found


def _weighted_correlation(
    a: NDArray[np.float64], b: NDArray[np.float64], weights: NDArray[np.int64]
) -> NDArray[np.float64]:
    middle = (a.shape[1] + 1) / 2  # the mean rank of any resample
    a, b = a - middle, b - middle
    spread = np.sqrt((weights * a * a).sum(1) * (weights * b * b).sum(1))
    covariance = (weights * a * b).sum(1)
    return np.clip(np.divide(covariance, spread, out=np.full(len(a), np.nan), where=spread > 0), -1, 1)


def midranks(values: ArrayLike) -> NDArray[np.float64]:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(np.asarray(values, np.float64), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def spearman(first: ArrayLike, second: ArrayLike) -> float | None:
    """Spearman's rank correlation, ties averaged; None for fewer than two records or a list of one value only."""
    a, b = midranks(first), midranks(second)
    if len(a) < 2:
        return None
    a, b = a - a.mean(), b - b.mean()
    spread = math.sqrt(float(a @ a) * float(b @ b))
    return max(-1.0, min(1.0, float(a @ b) / spread)) if spread else None


def quantile_bins(values: NDArray[np.float64], bins: int) -> list[NDArray[np.int64]]:
    """Positions in at most `bins` groups of rising, about equally many values; equal values stay together."""
    order = np.argsort(values, kind="stable")
    rising = values[order]
    cuts = sorted(
        {int(np.searchsorted(rising, rising[len(order) * k // bins])) for k in range(1, bins) if len(order)} - {0}
    )
    return [part for part in np.split(order, cuts) if len(part)]


def _ratio(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float | None:
    larger = max(int(a.sum()), int(b.sum()))
    return int((a & b).sum()) / larger if larger else None


def _interval(values: NDArray[np.float64], edge: float) -> tuple[float | None, float | None]:
    defined = values[~np.isnan(values)]
    if not len(defined):
        return None, None
    low, high = np.quantile(defined, [edge, 1 - edge])
    return float(low), float(high)
