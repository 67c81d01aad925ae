"""Selections equal what sorting by hand gives, and ask for what is possible."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from llm_drop import Plan, Scores, apply, score, select, select_iteratively
from llm_drop.speculative import sharing_copy
from llm_drop.stability import bootstrap, resample

from model_hooks import RequestError

LAYERS = 6
SIMILARITY = st.lists(st.sampled_from([0.1, 0.5, 0.9, 0.95, 0.99]), min_size=LAYERS, max_size=LAYERS)


def made_up(attention: list[float], mlp: list[float], block: list[float], gaps: Any = ()) -> Scores:
    return Scores(
        "m", "f", LAYERS, "d", "df", 1, 1, dict(enumerate(attention)), dict(enumerate(mlp)), dict(enumerate(block)),
        {k: dict(enumerate(v)) for k, v in (("attention", attention), ("mlp", mlp), ("block", block))}, gaps,
    )  # fmt: skip


def by_hand(values: list[float], n: int) -> set[int]:
    """Highest similarity first; of equal ones the lower index."""
    return set(sorted(range(len(values)), key=lambda i: (-values[i], i))[:n])


@given(SIMILARITY, SIMILARITY, SIMILARITY, st.integers(1, LAYERS - 1))
def test_each_kind_drops_its_most_similar(a: list[float], m: list[float], b: list[float], n: int) -> None:
    scores = made_up(a, m, b)
    assert set(select(scores, attention=n).attention) == by_hand(a, n)
    assert set(select(scores, mlp=n).mlp) == by_hand(m, n)
    blocks = select(scores, blocks=n)
    assert set(blocks.blocks) == by_hand(b, n) == set(blocks.attention) == set(blocks.mlp)
    both = select(scores, attention=n, mlp=n)
    assert (set(both.attention), set(both.mlp)) == (by_hand(a, n), by_hand(m, n))


@given(SIMILARITY, SIMILARITY, st.integers(1, 2 * LAYERS - 1))
def test_joint_drop_sorts_both_kinds_in_one_list(a: list[float], m: list[float], n: int) -> None:
    chosen = by_hand([*a, *m], n)
    scores = made_up(a, m, a)
    if set(range(LAYERS)) <= chosen:
        with pytest.raises(RequestError, match="at least one attention layer must stay"):
            select(scores, joint=n)
        return
    plan = select(scores, joint=n)
    assert {*plan.attention, *(LAYERS + i for i in plan.mlp)} == chosen
    assert len(plan.attention) + len(plan.mlp) == n


@pytest.mark.parametrize("n", range(1, LAYERS))
def test_consecutive_drop_reads_the_gap_of_exactly_n(n: int) -> None:
    """Planted: only the run of n that starts at 1 (or 0) is similar at gap n; every other gap points elsewhere."""
    start = 1 if n < LAYERS - 1 else 0
    gaps = [[0.5 + 0.01 * i if (i, g) != (start, n) else 0.99 for g in range(1, LAYERS - i + 1)] for i in range(LAYERS)]
    plan = select(made_up([0.5] * LAYERS, [0.5] * LAYERS, [0.5] * LAYERS, gaps), blocks=n, consecutive=True)
    assert plan.blocks == tuple(range(start, start + n))


def test_the_other_objective_reads_the_relative_change() -> None:
    scores = made_up([0.9, 0.8, 0.7, 0.6, 0.5, 0.4], [0.1] * LAYERS, [0.1] * LAYERS)
    assert select(scores, attention=1).attention == (0,)
    assert select(scores, attention=1, objective="norm").attention == (5,)  # the ratios made up above are the cosines


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "asked for nothing"),
        ({"attention": LAYERS}, r"attention 6 is out of range; allowed: 1\.\.5; at least one attention"),
        ({"attention": -1}, r"allowed: 1\.\.5"),
        ({"attention": 0, "mlp": 2}, r"attention 0 is out of range; allowed: 1\.\.5"),
        ({"mlp": LAYERS + 1}, r"mlp 7 is out of range; allowed: 1\.\.6$"),
        ({"blocks": LAYERS}, r"allowed: 1\.\.5"),
        ({"joint": 2 * LAYERS}, r"allowed: 1\.\.11"),
        ({"joint": 2, "mlp": 1}, "give attention and/or mlp, or blocks, or joint"),
        ({"attention": 1, "consecutive": True}, "of whole blocks"),
        ({"attention": 1, "objective": "sine"}, "there are 'cosine' and 'norm'"),
        ({"blocks": 1, "consecutive": True}, "score again with gaps"),
    ],
)
def test_impossible_requests_say_what_is_possible(request_: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        select(made_up([0.5] * LAYERS, [0.5] * LAYERS, [0.5] * LAYERS), **request_)


@pytest.mark.parametrize("how", [{}, {"consecutive": True}])
def test_blocks_of_a_model_that_lost_attention_leave_one(how: dict[str, Any]) -> None:
    """Two blocks of six have attention still, and are those that change the least."""
    gaps = [[0.9 - 0.1 * i] * (LAYERS - i) for i in range(LAYERS)]
    whole = made_up([0.5] * LAYERS, [0.5] * LAYERS, [0.9, 0.8, 0.3, 0.2, 0.1, 0.0], gaps)
    scores = replace(whole, attention={0: 0.5, 1: 0.5})
    with pytest.raises(RequestError, match=r"^blocks 2.* would drop every attention layer; .*must stay: ask for fewer"):
        select(scores, blocks=2, **how)
    assert select(scores, blocks=1, **how).attention == (0,)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_named(bad: float) -> None:
    scores = made_up([0.5, 0.5, bad, 0.5, 0.5, 0.5], [0.5] * LAYERS, [0.5] * LAYERS)
    with pytest.raises(RequestError, match="attention 2"):
        select(scores, attention=1)


def test_iterative_selection_measures_what_is_left(model: Any, sequences: torch.Tensor) -> None:
    """Against a loop written out: drop one, measure the rest with the halves that stay acting, drop the next."""

    def measure(taken: Plan | None) -> Scores:
        return score(model if taken is None else apply(sharing_copy(model), taken, check=False), sequences)

    plan = select_iteratively(measure, {"attention": 1}, 3)
    gone: list[int] = []
    for _ in range(3):
        left = score(apply(sharing_copy(model), Plan(LAYERS, tuple(gone)), check=False), sequences).attention
        assert set(left) == set(range(LAYERS)) - set(gone)
        gone.append(max(left, key=left.__getitem__))
    assert plan.attention == tuple(sorted(gone))
    assert "iterative" in plan.how


def test_the_bootstrap_resamples_groups(scores: Scores) -> None:
    groups = len(scores.group_tokens)
    same = resample(scores, torch.ones(groups, dtype=torch.float64))
    assert same.attention == pytest.approx(scores.attention)
    alone = torch.zeros(groups, dtype=torch.float64)
    alone[3] = 2
    expected = {i: sums[3] / scores.group_tokens[3] for i, sums in scores.group_sums["attention"].items()}
    assert resample(scores, alone).attention == pytest.approx(expected)

    found = bootstrap(scores, attention=2, draws=50)
    assert 0 < found.agreement <= 1
    assert sum(found.frequency.values()) == pytest.approx(2)
    for unit, (low, high) in found.interval.items():
        assert low <= scores.importance()[unit] * 1.5
        assert low <= high


def test_a_choice_without_doubt_is_always_made(scores: Scores) -> None:
    sums = {i: [t * (0.999 if i == 4 else 0.1) for t in scores.group_tokens] for i in range(LAYERS)}
    sure = replace(
        scores, attention={i: 0.999 if i == 4 else 0.1 for i in range(LAYERS)},
        group_sums={**scores.group_sums, "attention": sums},
    )  # fmt: skip
    found = bootstrap(sure, attention=1, draws=20)
    assert found.frequency == {("attention", 4): 1.0}
    assert found.agreement == 1.0
