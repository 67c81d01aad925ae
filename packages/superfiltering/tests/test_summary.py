"""The report on a list of scores: counts that add up, and nothing in it that JSON cannot hold."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from superfiltering.summary import examples, histogram, length_table, quantiles, stats

from model_hooks import RequestError

SCORE = st.one_of(st.none(), st.floats(-5, 50), st.just(math.nan), st.just(math.inf))


@given(st.lists(st.tuples(SCORE, st.sampled_from(["ok", "failed"]), st.integers(0, 9)), max_size=40))
def test_every_record_is_counted_once_and_strict_json_holds_it(rows):
    scores, statuses, lengths = ([row[k] for row in rows] for k in range(3))
    found = stats(scores, statuses=statuses, lengths=lengths)
    json.dumps(asdict(found), allow_nan=False)
    bars = found.histogram
    finite = [s for s in scores if s is not None and math.isfinite(s)]
    assert sum(bars.counts) + bars.below + bars.above == len(finite) == found.scored
    assert bars.none == len(rows) - len(finite)
    assert sum(found.statuses.values()) == len(rows)
    assert found.below_maximum == sum(s < 1 for s in finite)
    assert sum(row.records for row in found.lengths.rows) == len(rows)
    assert sum(row.scored for row in found.lengths.rows) == len(finite)
    if finite:
        assert found.mean == pytest.approx(math.fsum(finite) / len(finite))
        assert found.quantiles[0.0] == min(finite)
        assert found.quantiles[1.0] == max(finite)


def test_histogram_against_counting():
    values = np.random.default_rng(0).gamma(2, 0.3, 500)
    values[0] = 1e6  # does not squeeze the rest
    found = histogram(values, bins=12)
    assert found.edges[0] == 0
    assert found.edges[-1] == pytest.approx(np.quantile(values, 0.995))
    assert found.above == sum(values > found.edges[-1])
    for k, count in enumerate(found.counts[:-1]):
        assert count == sum((values >= found.edges[k]) & (values < found.edges[k + 1]))
    assert histogram([0.2, 0.4], bins=4).edges == [0, 0.25, 0.5, 0.75, 1.0]
    given = histogram([-1, 0, 1, 2, 3], bins=2, low=0, high=2)
    assert (given.counts, given.below, given.above) == ([1, 2], 1, 1)


def test_length_table_shows_the_bias():
    lengths = np.repeat([10, 20, 40, 80], 25)
    scores = np.where(lengths < 30, 1.2, 0.4) + np.linspace(0, 0.05, 100)
    table = length_table(lengths, scores, bins=4)
    assert [(row.low, row.high, row.records) for row in table.rows] == [(v, v, 25) for v in (10, 20, 40, 80)]
    assert [row.below_maximum for row in table.rows] == [0, 0, 1, 1]
    assert table.rows[0].median == pytest.approx(np.median(scores[:25]))
    assert table.spearman < -0.5
    one = length_table([5, 5, 5], [0.1, 0.2, None], bins=4)
    assert [(row.records, row.scored) for row in one.rows] == [(3, 2)]
    assert one.spearman is None  # all of one length


def test_examples_stand_at_their_quantiles():
    scores = [None, *np.random.default_rng(1).permutation(101) / 100]
    found = examples(scores, each=3)
    assert [scores[k] for k in found[0.0]] == [0.0, 0.01, 0.02]
    assert [scores[k] for k in found[0.5]] == [0.5, 0.49, 0.51]
    assert [scores[k] for k in found[1.0]] == [1.0, 0.99, 0.98]
    assert examples([None], each=2)[0.5] == []
    assert quantiles([math.nan]) == {}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stats([0.1], statuses=["ok", "ok"]), "2 statuses for 1 scores"),
        (lambda: stats([0.1], lengths=[1, 2]), "2 lengths for 1 scores"),
        (lambda: histogram([0.1], bins=0), "1 or more"),
        (lambda: histogram([0.1], low=1, high=1), "must be below"),
        (lambda: length_table([math.nan], [0.1]), "finite"),
    ],
)
def test_requests_that_cannot_be_met(call, message):
    with pytest.raises(RequestError, match=message):
        call()
