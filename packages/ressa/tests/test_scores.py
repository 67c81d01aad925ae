"""Scores by their published rules, against values worked out by hand and invariants."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ressa.scores import cider, mean_and_error, normalise, recall_at, vqa_accuracy


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The Red car.", "red car"),
        ("two dogs", "2 dogs"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("a man, running", "man running"),
        ("left-right", "left right"),
        ("3.5", "3.5"),
        ("U.S.", "us"),
        ("1,000", "1000"),
        (" yes\n", "yes"),
        ("what?", "what"),
    ],
)
def test_answers_are_evened_out(answer: str, normal: str) -> None:
    assert normalise(answer) == normal


@pytest.mark.parametrize(
    ("same", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)  # of 10 people: leaving one of them out makes 3 equal answers worth 0.9
def test_vqa_accuracy_of_ten_people(same: int, accuracy: float) -> None:
    assert vqa_accuracy("red", ["Red."] * same + ["blue"] * (10 - same)) == pytest.approx(accuracy)


def test_vqa_accuracy_of_few_people_is_whether_one_agrees() -> None:
    assert vqa_accuracy("a red", ["red"]) == 1
    assert vqa_accuracy("blue", ["red", "green"]) == 0
    with pytest.raises(ValueError, match="no answers"):
        vqa_accuracy("blue", [])


def test_cider_by_hand() -> None:
    # three images; each word of the first caption is in one image's references alone, so its weight is log 3
    perfect, wrong, half = cider(["red cat", "blue", "green dog"], [["red cat"], ["old car"], ["green bird"]])
    assert perfect == pytest.approx(10 * (1 + 1) / 4)  # cosines 1 of one and two words; there are no longer n-grams
    assert wrong == 0
    assert half == pytest.approx(10 * 0.5 / 4)


def test_cider_counts_length_and_clips() -> None:
    references = [["red cat"], ["blue dog"]]
    exact, longer, again = (
        cider([said, "x"], references)[0] for said in ("red cat", "red cat sits", "red red red cat")
    )
    assert exact > longer > 0
    weight = math.log(2)
    clipped = 2 * weight**2 / (math.sqrt(10) * weight * math.sqrt(2) * weight)
    pairs = 1 / (math.sqrt(5))  # (red, cat) once of (red, red) twice and itself
    expected = 10 * (clipped + pairs) / 4 * math.exp(-4 / 72)
    assert again == pytest.approx(expected)
    with pytest.raises(ValueError, match="2 captions and 1 groups"):
        cider(["a", "b"], [["a"]])


@given(
    st.lists(st.lists(st.sampled_from(["red", "blue", "cat", "dog"]), min_size=1, max_size=6), min_size=2, max_size=5)
)
def test_cider_is_from_zero_to_ten(sentences: list[list[str]]) -> None:
    said = [" ".join(words) for words in sentences]
    scores = cider(said, [[one] for one in said])
    assert all(-1e-9 <= score <= 10 + 1e-9 for score in scores)


@given(st.lists(st.lists(st.floats(-5, 5), min_size=4, max_size=4), min_size=1, max_size=5))
def test_recall_grows_with_k_to_one(rows: list[list[float]]) -> None:
    right = [i % 4 for i in range(len(rows))]
    found = [recall_at(k, rows, right) for k in (1, 2, 4)]
    assert found == sorted(found)
    assert found[-1] == 1


def test_recall_by_hand() -> None:
    assert recall_at(1, [[1, 2, 3], [3, 2, 1]], [2, 2]) == 0.5
    assert recall_at(1, [[1, 1]], [0]) == 0  # a tie is no hit


def test_the_error_of_a_mean() -> None:
    assert mean_and_error([1.0, 0.0, 1.0, 0.0]) == {"value": 0.5, "se": pytest.approx(math.sqrt(1 / 3 / 4)), "n": 4}
    assert mean_and_error([1.0])["se"] == 0
