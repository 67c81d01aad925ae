"""What a scored data set looks like: distribution, length against score, and records to read at each quantile.

Lengths matter because it is disputed whether the score favours short answers: the table shows it for the data at hand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from model_hooks import RequestError

from .agreement import quantile_bins, spearman
from .selection import as_scores

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True)
class Histogram:
    """counts[k] of the values lie in [edges[k], edges[k + 1]), the last bin with its right edge.

    `below` and `above` count the finite values outside of the edges, `none` the records without a finite value.
    """

    edges: list[float]
    counts: list[int]
    below: int
    above: int
    none: int


@dataclass(frozen=True)
class LengthRow:
    """Records of a length within [low, high]: how many have a score, its quartiles, the part below the maximum."""

    low: float
    high: float
    records: int
    scored: int
    quarter: float | None
    median: float | None
    three_quarters: float | None
    below_maximum: float | None


@dataclass(frozen=True)
class LengthTable:
    """Length against score; `spearman` is over the records that have a score."""

    rows: list[LengthRow]
    spearman: float | None


@dataclass(frozen=True)
class Stats:
    """The report on one list of scores. `examples` are positions by quantile, nearest to it first."""

    records: int
    scored: int
    below_maximum: int
    mean: float | None
    quantiles: dict[float, float]
    statuses: dict[str, int]
    histogram: Histogram
    lengths: LengthTable | None
    examples: dict[float, list[int]]


def stats(
    scores: ArrayLike,
    *,
    statuses: Sequence[str] | None = None,
    lengths: ArrayLike | None = None,
    maximum: float = 1.0,
    bins: int = 40,
    length_bins: int = 8,
    each: int = 3,
) -> Stats:
    """Describe scores (NaN or None: no score) of records, with a status and a length of each where given.

    Nothing in the result is NaN or infinite: what is undefined is None, and what has no value is left out.
    Raises `RequestError` for columns of different length.
    """
    values = as_scores(scores)
    for name, column in (("statuses", statuses), ("lengths", lengths)):
        if column is not None and len(np.asarray(column)) != len(values):
            raise RequestError(f"{len(np.asarray(column))} {name} for {len(values)} scores; one each is needed")
    finite = values[np.isfinite(values)]
    return Stats(
        records=len(values),
        scored=len(finite),
        below_maximum=int((finite < maximum).sum()),
        mean=float(finite.mean()) if len(finite) else None,
        quantiles=quantiles(values),
        statuses=dict(Counter(statuses or ()).most_common()),
        histogram=histogram(values, bins=bins),
        lengths=None if lengths is None else length_table(lengths, values, bins=length_bins, maximum=maximum),
        examples=examples(values, each=each),
    )


def quantiles(values: ArrayLike, levels: Sequence[float] = QUANTILES) -> dict[float, float]:
    """Quantiles of the finite values by level, linearly interpolated; empty where there is no value."""
    finite = _finite(values)
    return dict(zip(levels, np.quantile(finite, levels).tolist())) if len(finite) else {}


def histogram(values: ArrayLike, *, bins: int = 40, low: float | None = None, high: float | None = None) -> Histogram:
    """A histogram of equal bins from `low` to `high`.

    By default from 0, or the least value, to the 99.5 % quantile, but at least to 1: one wild perplexity ratio must
    not squeeze all others into the first bin.
    """
    if bins < 1:
        raise RequestError(f"{bins} bins; a histogram has 1 or more")
    finite = _finite(values)
    if low is None:
        low = min(0.0, float(finite.min(initial=0.0)))
    if high is None:
        high = max(1.0, float(np.quantile(finite, 0.995)) if len(finite) else 1.0)
    if not low < high:
        raise RequestError(f"a histogram from {low} to {high}; the first must be below the second")
    counts, edges = np.histogram(finite, bins, (low, high))
    return Histogram(
        edges=edges.tolist(),
        counts=counts.tolist(),
        below=int((finite < low).sum()),
        above=int((finite > high).sum()),
        none=np.size(values) - len(finite),
    )


def length_table(lengths: ArrayLike, scores: ArrayLike, *, bins: int = 8, maximum: float = 1.0) -> LengthTable:
    """Scores by `bins` groups of rising length and about equal size; equal lengths are in the same group."""
    of, values = np.asarray(lengths, np.float64), as_scores(scores)
    if not np.isfinite(of).all():
        raise RequestError("a length is not a finite number; give every record's length in tokens or characters")
    rows = []
    for part in quantile_bins(of, bins):
        inside = _finite(values[part])
        first, median, third = np.quantile(inside, [0.25, 0.5, 0.75]).tolist() if len(inside) else (None,) * 3
        below = float((inside < maximum).mean()) if len(inside) else None
        low, high = float(of[part].min()), float(of[part].max())
        rows.append(LengthRow(low, high, len(part), len(inside), first, median, third, below))
    scored = np.isfinite(values)
    return LengthTable(rows, spearman(of[scored], values[scored]))


def examples(values: ArrayLike, levels: Sequence[float] = QUANTILES, *, each: int = 3) -> dict[float, list[int]]:
    """Positions of the `each` records around each quantile in the order of scores, the nearest rank first."""
    scores = as_scores(values)
    where = np.flatnonzero(np.isfinite(scores))
    rising = where[np.argsort(scores[where], kind="stable")]
    ranks = np.arange(len(rising))
    found = {}
    for level in levels:
        nearest = np.argsort(np.abs(ranks - level * (len(rising) - 1)), kind="stable")[:each]
        found[level] = rising[nearest].tolist()
    return found


def _finite(values: ArrayLike) -> NDArray[np.float64]:
    found = as_scores(values)
    return found[np.isfinite(found)]
