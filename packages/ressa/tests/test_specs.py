"""Requests are understood, or refused in one line that says what was given."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ressa.specs import by_branch, implied, ratios, read_specs, share

from model_hooks.errors import RequestError


def test_the_originals_second_number_is_what_is_kept() -> None:
    (spec,) = read_specs("24-0.3-1.0-1.0")
    assert (spec.layers, spec.sparsity) == (24, 0.7)
    assert spec.say() == "keep 30 % = sparsity 70 %, of every branch with 24 layers"


def test_specs_go_to_the_branches_they_fit() -> None:
    both = read_specs("vision:39-0.5-1.0-1.0,language:24-0.3-1.0-1.0")
    assert by_branch(both, {"vision": 39, "language": 48}) == {"vision": 0.5, "language": 0.7}  # T5: 24 + 24
    assert by_branch(read_specs("24-0.5-1.0-1.0"), {"vision": 39, "language": 24}) == {"vision": 0, "language": 0.5}
    with pytest.raises(RequestError, match="for 7 layers fits no branch; blocks of this model: vision 39, language 24"):
        by_branch(read_specs("7-0.5-1.0-1.0"), {"vision": 39, "language": 24})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0.5", "is not LAYERS-KEEP-ATTENTION-MLP"),
        ("24-0-1.0-1.0", "the share that is KEPT"),
        ("24-1.5-1.0-1.0", "the share that is KEPT"),
        ("24-0.5-0.5-1.0", "narrows attention or MLP"),
    ],
)
def test_other_specs_are_refused(text: str, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        read_specs(text)


@given(st.floats(1.001, 99.9))
def test_a_percentage_is_asked_back(value: float) -> None:
    with pytest.raises(RequestError, match=rf"--sparsity .* did you mean {value / 100:.2f}\?"):
        share(value, "--sparsity")


@pytest.mark.parametrize("value", [-0.1, 1.0, 100.0, float("nan")])
def test_what_is_no_share_is_refused(value: float) -> None:
    with pytest.raises(RequestError, match="is not a share from 0 to below 1"):
        share(value, "--vision")


def test_ratios_and_patterns() -> None:
    assert ratios("10:90, 50:50") == ((0.1, 0.9), (0.5, 0.5))
    assert [implied(p) for p in ("2:4", "1:4", "4:8", "", "5:4")] == [0.5, 0.75, 0.5, 0.5, 0.5]
    for text in ("50", "50:100", "a:b"):
        with pytest.raises(RequestError, match="--ratios"):
            ratios(text)
