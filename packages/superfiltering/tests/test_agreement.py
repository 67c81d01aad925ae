"""Rank agreement against scipy and against resampling done record by record."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from superfiltering.agreement import _resample, _Side, align, compare, midranks, quantile_bins, spearman
from superfiltering.selection import select

from model_hooks import RequestError

VALUES = st.lists(st.sampled_from([0.1, 0.2, 0.25, 0.5, 0.8, 1.0, 1.7]), min_size=2, max_size=30)


def naive_midranks(values):
    return [sum(w < v for w in values) + (sum(w == v for w in values) + 1) / 2 for v in values]


@given(VALUES, st.randoms(use_true_random=False))
def test_spearman_with_ties(values, random):
    other = random.choices(values, k=len(values))
    a, b = naive_midranks(values), naive_midranks(other)
    assert midranks(values).tolist() == a
    found = spearman(values, other)
    if len(set(values)) == 1 or len(set(other)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-12)
        assert spearman(values, values) == 1.0
        assert spearman(values, [-v for v in values]) == -1.0


def test_spearman_is_scipy_s():
    scipy = pytest.importorskip("scipy.stats")
    draw = np.random.default_rng(0)
    for n in (2, 5, 100, 5000):
        a, b = draw.normal(size=n).round(1), draw.normal(size=n).round(1)
        assert spearman(a, b) == pytest.approx(scipy.spearmanr(a, b).statistic, abs=1e-12)
        np.testing.assert_array_equal(midranks(a), scipy.rankdata(a))


def test_a_model_with_itself():
    scores = [*np.random.default_rng(1).uniform(0.3, 1.4, 400), math.nan]
    found = compare(scores, scores, lengths=np.arange(401), resamples=50)
    assert (found.records, found.neither) == (400, 1)
    assert [found.spearman.value, found.spearman.low, found.spearman.high] == [1.0] * 3
    for overlap, asked in zip(found.overlaps, (20, 40, 60)):
        assert (overlap.asked, overlap.shared) == (asked, asked)
        assert [overlap.ratio.value, overlap.ratio.low, overlap.ratio.high] == [1.0] * 3
    assert [(row.records, row.spearman) for row in found.by_length] == [(80, 1.0)] * 5
    assert {value for row in found.by_length for value in row.overlaps} <= {1.0, None}


def resampled(a, b, draw, shares, n):
    """One resample with the records written out: a selection and a rank correlation of the drawn rows."""
    records = draw.integers(0, n, (1, n))[0]
    found = [spearman(a[records], b[records])]
    for k in shares:
        counts = []
        for values in (a, b):
            top = select(values[records], ids=records.tolist(), top_n=k).chosen
            counts.append(np.bincount(records[top], minlength=n))
        larger = max(c.sum() for c in counts)
        found.append(np.minimum(*counts).sum() / larger if larger else None)
    return [math.nan if v is None else v for v in found]


@given(st.integers(2, 25), st.integers(0, 10**6), st.floats(0.5, 1.5))
def test_the_bootstrap_is_a_selection_from_drawn_records(n, seed, scale):
    draw = np.random.default_rng(seed)
    a, b = (scale * draw.uniform(size=n).round(1) for _ in range(2))
    sides = [_Side(values, list(range(n)), 1.0) for values in (a, b)]
    shares = [1, n // 2]
    fast = _resample(*sides, shares, 1, np.random.default_rng(seed))[0]
    np.testing.assert_allclose(fast, resampled(a, b, np.random.default_rng(seed), shares, n), atol=1e-12)


def test_the_interval_of_correlated_scores():
    """It contains the value, narrows with the data, does not depend on blocks, and comes again with the seed."""
    draw = np.random.default_rng(2)
    widths = []
    for n in (100, 2000):
        a = draw.normal(size=n)
        found = compare(a, a + draw.normal(size=n), maximum=None, resamples=300)
        assert found.spearman.low < found.spearman.value < found.spearman.high
        widths.append(found.spearman.high - found.spearman.low)
        # for the normal distribution with correlation r, Spearman's coefficient is 6 / pi arcsin(r / 2)
        assert found.spearman.low - 0.1 < 6 / math.pi * math.asin(math.sqrt(0.5) / 2) < found.spearman.high + 0.1
    assert widths[1] < widths[0] / 3
    assert compare(a, a[::-1], resamples=20, seed=4) == compare(a, a[::-1], resamples=20, seed=4)
    assert compare(a, a[::-1], resamples=20, seed=4) != compare(a, a[::-1], resamples=20, seed=5)


def test_unrelated_lists_meet_by_chance():
    draw = np.random.default_rng(3)
    found = compare(draw.uniform(size=4000), draw.uniform(size=4000), resamples=200)
    assert found.spearman.low < 0 < found.spearman.high
    assert found.overlaps[1].chance == 0.1
    assert found.overlaps[1].ratio.low < 0.1 < found.overlaps[1].ratio.high


def test_overlap_is_of_selections():
    a = [0.9, 0.8, 0.7, 0.6, 1.5, None]
    b = [0.5, 0.95, 1.2, 0.94, 0.99, 0.1]
    found = compare(a, b, shares=["40%", 1.0, 0.1], resamples=0)
    assert (found.records, found.only_second, found.only_first) == (5, 1, 0)
    half, whole, none = found.overlaps
    assert (half.asked, half.shared, half.ratio.value) == (2, 1, 0.5)  # {0, 1} and {4, 1}
    assert (whole.asked, whole.shared, whole.ratio.value) == (5, 3, 0.75)  # each has one score above 1
    assert (none.asked, none.ratio.value, none.chance) == (0, None, 0.0)
    assert found.spearman.low is None


def test_aligned_by_id():
    ids, a, b = align(["x", "y", "z"], [1, 2, None], ["z", "w", "x"], [3, 4, 5])
    assert ids == ["x", "y", "z", "w"]
    np.testing.assert_array_equal(a, [1, 2, math.nan, math.nan])
    np.testing.assert_array_equal(b, [5, math.nan, 3, 4])
    with pytest.raises(RequestError, match="id 'y' stands twice"):
        align(["x", "y", "y"], [1, 2, 3], ["x"], [1])
    with pytest.raises(RequestError, match="1 ids for 2 scores"):
        align(["x"], [1, 2], ["x"], [1])


@given(VALUES, st.integers(1, 6))
def test_bins_part_the_records(values, bins):
    lengths = np.array(values)
    parts = quantile_bins(lengths, bins)
    assert sorted(np.concatenate(parts)) == list(range(len(values)))
    assert len(parts) <= bins
    for left, right in itertools.pairwise(parts):
        assert lengths[left].max() < lengths[right].min()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"second": [1.0]}, "1 second scores for 3"),
        ({"lengths": [1, 2]}, "2 lengths for 3"),
        ({"ids": [1, 2]}, "2 ids for 3"),
        ({"second": [None, None, None]}, "none of 3 records has both"),
        ({"shares": [2]}, "at most 100%"),
        ({"confidence": 1.0}, "confidence"),
        ({"resamples": -1}, "resamples"),
    ],
)
def test_requests_that_cannot_be_met(change, message):
    with pytest.raises(RequestError, match=message):
        compare(**{"first": [0.1, 0.2, 0.3], "second": [0.1, 0.2, 0.3], **change})
