"""The paper's selection against the original's rule and a naive one; shares, ties, bounds, groups; turns of talks."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from superfiltering.selection import (
    NO_SCORE,
    RANKED_LOWER,
    REASONS,
    TOO_HIGH,
    TOO_LOW,
    TURNS,
    GroupCount,
    aggregate,
    allot,
    original_selection,
    parse_share,
    select,
)

from instruct_data.ifd import ifd
from model_hooks import RequestError

SCORES = st.lists(
    st.one_of(st.none(), st.sampled_from([0.2, 0.5, 0.5, 0.9, 1.0, 1.0000001, math.nan, math.inf, -math.inf, 2.0])),
    min_size=1, max_size=40,
)  # fmt: skip


def naive(scores, ids, n, maximum=1.0, minimum=-math.inf):
    """Positions by sorting tuples in Python."""
    kept = [(-s, i, k) for k, (s, i) in enumerate(zip(scores, ids)) if isinstance(s, float) and minimum < s < maximum]
    return [k for *_, k in sorted(kept)][:n]


@given(SCORES, st.integers(1, 50), st.randoms(use_true_random=False))
def test_select_equals_sorting_and_does_not_see_the_order_of_the_input(scores, n, random):
    ids = random.sample(range(1000), len(scores))
    found = select(scores, ids, top_n=n)
    assert found.chosen.tolist() == naive(scores, ids, n)
    assert found.asked == n
    assert found.missing == n - len(found.chosen)
    assert sum(found.dropped.values()) + len(found.chosen) == len(scores)
    order = random.sample(range(len(scores)), len(scores))
    again = select([scores[k] for k in order], [ids[k] for k in order], top_n=n)
    assert [ids[order[k]] for k in again.chosen] == [ids[k] for k in found.chosen]


def original(scores, rate, total):
    """The original's lines, written again: a filter, Python's stable sort, a slice."""
    kept = [(k, s) for k, s in enumerate(scores) if s < 1]
    return [k for k, _ in sorted(kept, key=lambda pair: pair[1], reverse=True)[: int(total * rate)]]


@given(st.lists(st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.99999, 1.0, 1.2, math.nan]), min_size=1, max_size=200))
def test_the_original_rule(scores):
    assert original_selection(scores, 0.1).tolist() == original(scores, 0.1, len(scores))
    assert original_selection(scores, 0.05, records=52002).tolist() == original(scores, 0.05, 52002)
    if len(scores) >= 10:  # ours without ids is the same rule
        assert select(scores, top="10%").chosen.tolist() == original(scores, 0.1, len(scores))


def test_reasons():
    found = select([0.5, 1.0, None, 0.1, math.nan, 0.2, math.inf, 0.4], top_n=1, minimum=0.1)
    assert found.chosen.tolist() == [0]
    assert found.dropped == {NO_SCORE: 2, TOO_HIGH: 2, TOO_LOW: 1, RANKED_LOWER: 2}
    assert [REASONS[r] if r >= 0 else "" for r in found.reasons] == [
        "", TOO_HIGH, NO_SCORE, TOO_LOW, NO_SCORE, RANKED_LOWER, TOO_HIGH, RANKED_LOWER,
    ]  # fmt: skip
    assert (found.survivors, found.missing) == (3, 0)


@pytest.mark.parametrize(
    ("n", "top", "asked"),
    [(100, 0.29, 29), (100, "29%", 29), (10, "10%", 1), (19, 0.1, 1), (20, 0.1, 2), (52002, 0.1, 5200), (3, 1, 3),
     (7, "15 %", 1), (30, Fraction(1, 3), 10)],
)  # fmt: skip
def test_a_share_is_of_the_records_there_are_rounded_down(n, top, asked):
    found = select(np.linspace(0.1, 0.9, n), top=top)
    assert (found.asked, len(found.chosen)) == (asked, asked)


def test_share_of_the_kept():
    scores = [0.5] * 10 + [1.5] * 10
    assert select(scores, top=0.1, of="kept").asked == 1
    assert select(scores, top=0.1).asked == 2
    assert select(scores, top=1.0).missing == 10
    assert len(select(scores).chosen) == 10  # nothing asked for: all within the bounds
    assert len(select(scores, maximum=None).chosen) == 20


def test_ids_as_text_and_numbers():
    assert select([0.5] * 4, ["10", "9", "b", "a"]).chosen.tolist() == [1, 0, 3, 2]
    assert select([0.5] * 4, [10, 9, -1, 9]).chosen.tolist() == [2, 1, 3, 0]  # equal ids: by position
    assert select([0.5, 0.6, 0.5], ["x", 3, 7]).chosen.tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top": "10%"}, r"10% of 7 records, rounded down, is no record at all: at least 10 are needed"),
        ({"top": 0.1, "of": "kept", "maximum": 0.4}, "10% of 3 records within the bounds"),
        ({"top": 0.3, "groups": list("aabbccd")}, "30% of 7 records in 4 groups.*at least 4 in a group"),
        ({"top": 0}, "above 0"),
        ({"top": "110%"}, "at most 100%"),
        ({"top": "ten"}, "'ten' is no number"),
        ({"top": "1/0"}, "is no number"),
        ({"top": math.nan}, "is no number"),
        ({"top": 0.5, "top_n": 3}, "one of the two"),
        ({"top_n": 0}, "ask for 1 or more"),
        ({"of": "some"}, "all records"),
        ({"minimum": 1.0}, "no score lies strictly between"),
        ({"maximum": math.nan}, "not a number"),
        ({"ids": [1]}, "1 ids for 7 scores"),
        ({"groups": ["a"]}, "1 group labels for 7 scores"),
    ],
)
def test_requests_that_cannot_be_met(change, message):
    with pytest.raises(RequestError, match=message):
        select(np.arange(1, 8) / 10, **change)


@pytest.mark.parametrize(("scores", "message"), [([], "no records"), (["x"], "a number"), ([[0.1]], "shape")])
def test_scores_that_are_none(scores, message):
    with pytest.raises(RequestError, match=message):
        select(scores, top_n=1)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 1.3)), min_size=4, max_size=60), st.booleans())
def test_groups_are_selections_of_their_own(rows, kept):
    labels, scores = [g for g, _ in rows], [s for _, s in rows]
    of = "kept" if kept else "all"
    try:
        found = select(scores, top=0.25, of=of, groups=labels)
    except RequestError:
        assert all(sum(g == label and (not kept or s < 1) for g, s in rows) < 4 for label in labels)
        return
    for label in set(labels):
        where = [k for k, g in enumerate(labels) if g == label]
        inside = [scores[k] for k in where]
        n = (sum(s < 1 for s in inside) if kept else len(inside)) // 4
        alone = [where[k] for k in naive(inside, range(len(inside)), n)]
        assert [k for k in found.chosen if labels[k] == label] == alone
        assert found.groups[label] == GroupCount(len(where), n, sum(s < 1 for s in inside), len(alone))
    assert [scores[k] for k in found.chosen] == sorted((scores[k] for k in found.chosen), reverse=True)


def test_a_number_is_divided_among_groups():
    found = select([0.9, 0.8, 0.7, 0.6, 0.5, 1.5], groups=list("aaaabb"), top_n=3)
    assert {g: c.chosen for g, c in found.groups.items()} == {"a": 2, "b": 1}
    assert found.chosen.tolist() == [0, 1, 4]
    more = select([0.9, 1.8], groups=["a", "b"], top_n=5)
    assert (more.asked, more.missing, more.groups["b"]) == (5, 4, GroupCount(1, 1, 0, 0))


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.data())
def test_allotment_is_in_proportion(sizes, data):
    total = data.draw(st.integers(0, sum(sizes)))
    parts = allot(dict(enumerate(sizes)), total)
    assert sum(parts.values()) == total
    for k, size in enumerate(sizes):
        assert parts[k] <= size
        assert abs(parts[k] - (total * size / sum(sizes) if size else 0)) < 1


def test_more_than_there_is_cannot_be_divided():
    with pytest.raises(RequestError, match="5 of 3 records in 2 groups"):
        allot({"a": 1, "b": 2}, 5)


def test_shares_are_exact():
    assert parse_share("2.5%") == Fraction(1, 40)
    assert parse_share(0.1) == Fraction(1, 10)


TURN = st.tuples(st.floats(0, 50), st.integers(0, 9), st.floats(0, 50), st.integers(0, 9))


@given(st.lists(st.lists(TURN, max_size=4), min_size=1, max_size=6), st.sampled_from(TURNS))
def test_turns_of_a_conversation(talks, how):
    """Against instruct_data.ifd, turn by turn."""
    rows = [(k, *turn) for k, talk in enumerate(talks) for turn in talk]
    columns = np.array(rows, dtype=float).reshape(-1, 5).T
    ppl, loss = aggregate(*columns, how=how, records=len(talks))
    for k, talk in enumerate(talks):
        singles = [ifd(*turn) for turn in talk]
        ok = [(t, s) for t, s in zip(talk, singles) if s.ifd_ppl is not None and s.ifd_loss is not None]
        if how == "last":
            wanted = (singles[-1].ifd_ppl, singles[-1].ifd_loss) if talk else (None, None)
        elif not ok:
            wanted = (None, None)
        elif how == "token-weighted":
            pooled = ifd(*(sum(column) for column in zip(*(t for t, _ in ok))))
            wanted = (pooled.ifd_ppl, pooled.ifd_loss)
        else:
            over = {"mean": lambda v: math.fsum(v) / len(v), "min": min}[how]
            wanted = (over([s.ifd_ppl for _, s in ok]), over([s.ifd_loss for _, s in ok]))
        for value, want in zip((ppl[k], loss[k]), wanted):
            assert math.isnan(value) if want is None else value == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("how", TURNS)
def test_one_turn_is_its_own_score(how):
    ppl, loss = aggregate([0, 1], [3.3, None], [3, 2], [4.7, 1.0], [2, 2], how=how)
    one = ifd(3.3, 3, 4.7, 2)
    assert (ppl[0], loss[0]) == (one.ifd_ppl, one.ifd_loss)
    assert np.isnan([ppl[1], loss[1]]).all()


def test_unknown_aggregation():
    with pytest.raises(RequestError, match="mean, min, token-weighted, last"):
        aggregate([0], [1.0], [1], [1.0], [1], how="best")  # type: ignore[arg-type]
