"""Selection: the published rule, all cases one by one and at random; and what an unknown score can never do."""

from __future__ import annotations

import math
import random
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reflection_tuning.policy import PRESETS, VERSIONS, Decision, Ratios, Rule, SelectionPolicy, as_data, load_policy

from model_hooks import RequestError

PAPER = PRESETS["v2-paper"]


def published(ifd: dict[str, float], rifd: dict[str, float]) -> tuple[str, bool]:
    """The published rule: (winner, whether it is written)."""
    instruction = ifd["Q"] > ifd["ori"]
    old, new = ("Q", "QA") if instruction else ("ori", "A")
    winner = new if rifd[new] < rifd[old] else old
    return winner, rifd[winner] < 1 and ifd[winner] < 1 and winner in ("QA", "A")


def scores(ifd: dict[str, float], rifd: dict[str, float]) -> dict[str, Ratios | None]:
    return {name: Ratios(ifd[name], rifd[name]) for name in ifd}


@pytest.mark.parametrize(("q", "a", "valid"), list(product("<=>", "<=>", (True, False))))
def test_the_truth_table(q: str, a: str, valid: bool) -> None:
    """All outcomes of both comparisons, ties among them, with winners inside and outside the bounds."""
    ifd = dict.fromkeys(VERSIONS, 0.8) | {"Q": {"<": 0.7, "=": 0.8, ">": 0.9}[q]}
    old, new = ("Q", "QA") if q == ">" else ("ori", "A")
    rifd = dict.fromkeys(VERSIONS, 0.5) | {new: {"<": 0.4, "=": 0.5, ">": 0.6}[a]}
    winner = new if a == "<" else old
    if not valid:
        ifd[winner] = 1.0 if winner not in ("Q", "ori") else ifd[winner]
        rifd[winner] = rifd[winner] if winner not in ("Q", "ori") else 1.0
        rifd[new] = rifd[new] if winner == new else 1.5
    found = PAPER.decide(scores(ifd, rifd))
    assert (found.version, found.emitted) == published(ifd, rifd)
    assert found.version == winner
    assert found.reason == ("out_of_bounds" if not valid else "" if winner in ("QA", "A") else "not_wanted")


def test_ten_thousand_records_as_published() -> None:
    draw = random.Random(0)
    levels = (0.5, 0.9, 0.999, 1.0, 1.001, 1.3)
    emitted = 0
    for _ in range(10_000):
        value = draw.choice((lambda: draw.choice(levels), lambda: draw.uniform(0.1, 1.5)))
        ifd, rifd = ({name: value() for name in VERSIONS} for _ in range(2))
        found = PAPER.decide(scores(ifd, rifd))
        assert (found.version, found.emitted) == published(ifd, rifd)
        emitted += found.emitted
    assert 1000 < emitted < 9000


BAD = (None, math.nan, math.inf, 0.0, -1.0)
any_score = st.one_of(st.sampled_from(BAD), st.floats(0.1, 2.0))


@given(st.fixed_dictionaries({name: st.tuples(any_score, any_score) for name in VERSIONS}))
def test_an_unknown_score_wins_nothing(values: dict[str, tuple[float | None, float | None]]) -> None:
    given_ = {name: Ratios(*pair) for name, pair in values.items()}
    for policy in (PAPER, PRESETS["v2-keep-all"]):
        found = policy.decide(given_)
        won = given_[found.version]
        if found.emitted:
            assert won.known("ifd") is not None
            assert won.known("rifd") is not None
        if found.version in ("Q", "QA"):
            assert given_["Q"].known("ifd") is not None
            assert given_["ori"].known("ifd") is not None
        if found.version in ("A", "QA"):
            assert won.known("rifd") is not None


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", VERSIONS)
def test_each_failed_version(name: str, bad: float | None) -> None:
    """The published files have 0 for a failure: an A of 0 would always be chosen, an ori of 0 make every Q better."""
    good = {"ori": Ratios(0.5, 0.9), "Q": Ratios(0.8, 0.8), "A": Ratios(0.5, 0.7), "QA": Ratios(0.8, 0.6)}
    found = PAPER.decide(good | {name: Ratios(bad, bad)})
    expected = {"ori": Decision("ori", False, "unscored"), "Q": Decision("A", True), "A": Decision("QA", True),
                "QA": Decision("Q", False, "unscored")}  # fmt: skip
    assert found == expected[name]
    assert PAPER.decide(dict.fromkeys(VERSIONS)) == Decision("ori", False, "unscored")


def test_versions_that_are_not_there_never_win() -> None:
    ori, better = Ratios(0.5, 0.9), Ratios(0.6, 0.5)
    assert PAPER.decide({"ori": ori}) == Decision("ori", False, "not_wanted")
    assert PAPER.decide({"ori": ori, "A": better}) == Decision("A", True)
    assert PAPER.decide({"ori": ori, "Q": better}) == Decision("Q", False, "not_wanted")
    assert PRESETS["v2-keep-all"].decide({"ori": ori, "Q": better}) == Decision("Q", True)
    v1 = PRESETS["v1"]
    assert not v1.needs_scores
    for there, winner in ((("Q", "QA"), "QA"), (("Q",), "Q"), (("A",), "A"), ((), "ori")):
        assert v1.decide(dict.fromkeys(("ori", *there))) == Decision(winner, True)


def test_margins_and_directions() -> None:
    policy = SelectionPolicy("mine", Rule("ifd_loss", "lower", 0.1), Rule("rifd", "lower", 0.2))
    old = Ratios(rifd=0.9, ifd_loss=0.9)
    assert policy.decide({"ori": old, "Q": Ratios(ifd_loss=0.85, rifd=0.9)}).version == "ori"
    assert policy.decide({"ori": old, "Q": Ratios(ifd_loss=0.75, rifd=0.9)}).version == "Q"
    assert policy.decide({"ori": old, "A": Ratios(rifd=0.75)}).version == "ori"


def test_a_policy_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "instruction: {metric: ifd, direction: higher, margin: 0.02}\nbounds: {rifd: [0, 0.9]}\nemit: [A]\n"
    )
    policy = load_policy(str(file))
    assert (policy.name, policy.instruction.margin, policy.bounds["rifd"], policy.emit) == (
        "mine",
        0.02,
        (0, 0.9),
        ("A",),
    )
    assert as_data(policy)["bounds"] == {"rifd": [0, 0.9]}
    for text, message in (
        ("emit: [B]", "emit 'B'"), ("bounds: {ifd: [1, 0]}", "bounds 'ifd'"), ("wins: 1", "unknown key 'wins'"),
        ("instruction: {metric: ppl}", "the metric is one of"), ("response: {margin: -1}", "margin -1"),
        ("instruction: 5", "configs/policy.yaml"), ("instruction: {better: 5}", "configs/policy.yaml"),
    ):  # fmt: skip
        file.write_text(text)
        with pytest.raises(RequestError, match=message):
            load_policy(str(file))
    with pytest.raises(RequestError, match="neither a file nor one of v1, v2-paper"):
        load_policy("v3")
