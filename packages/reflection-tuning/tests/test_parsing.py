"""Replies in every form, and what is read from them; and that the published rules read what is recorded of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reflection_tuning.parsing import INSTRUCTION, RESPONSE, form_of, parse

from instruct_data.llm import ParseError

sys.path.insert(0, str(Path(__file__).parent))  # for replies.py and published.py

import published
import replies


def ours(text: str, names: tuple[str, ...]) -> tuple[str | None, ...]:
    try:
        return tuple(parse(text, names)[name] for name in names)
    except ParseError:
        return (None,) * len(names)


def test_there_are_forty_replies_and_more() -> None:
    assert len(replies.INSTRUCTION) + len(replies.RESPONSE) >= 40


@pytest.mark.parametrize(("name", "text", "wanted", "theirs", "why"), replies.INSTRUCTION)
def test_reflections_on_instructions(
    name: str, text: str, wanted: replies.Pair, theirs: replies.Pair, why: int | None
) -> None:
    assert ours(text, INSTRUCTION) == wanted
    assert published.instruction_reply(text) == theirs
    assert (wanted != theirs) == (why is not None)


@pytest.mark.parametrize(("name", "text", "wanted", "theirs", "why"), replies.RESPONSE)
def test_reflections_on_answers(
    name: str, text: str, wanted: str | None, theirs: str | None, why: int | None
) -> None:  # fmt: skip
    assert ours(text, RESPONSE) == (wanted,)
    assert published.response_reply(text) == theirs
    assert (wanted != theirs) == (why is not None)


def test_the_criticism_is_kept() -> None:
    assert parse("Too short.\n[Better Answer] More. [End]", RESPONSE)["criticism"] == "Too short."
    found = parse('{"criticism": {"accuracy": "Wrong.", "detail": "None."}, "better_answer": "More."}', RESPONSE)
    assert found["criticism"] == "accuracy: Wrong.\ndetail: None."


def test_the_error_says_what_to_write() -> None:
    with pytest.raises(ParseError, match=r"\[New Instruction\] ... \[End\] ... \[New Answer\] ... \[End\]"):
        parse("hello", INSTRUCTION)
    with pytest.raises(ParseError, match="nothing was written there"):
        parse("[Better Answer] your answer [End]", RESPONSE)


def test_schemas_name_every_criterion() -> None:
    for names, count in ((INSTRUCTION, 9), (RESPONSE, 4)):
        schema = form_of(names).schema
        assert len(schema["properties"]["criticism"]["required"]) == count
        assert schema["required"] == ["criticism", *names]


words = st.text(st.characters(exclude_characters="[]{}`~", exclude_categories=("Cs", "Cc")), min_size=1).map(str.strip)


@given(words.filter(lambda text: bool(text)), words.filter(lambda text: bool(text)), st.booleans())
def test_what_is_written_between_tags_is_read_back(instruction: str, answer: str, ended: bool) -> None:
    end = "\n[End]" if ended else ""
    found = ours(f"Hm.\n[New Instruction]\n{instruction}{end}\n[New Answer]\n{answer}{end}", INSTRUCTION)
    assert found in ((instruction, answer), (None, None))
    if len(instruction) > 20 and len(answer) > 20:
        assert found == (instruction, answer)


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    for names in (INSTRUCTION, RESPONSE):
        found = ours(text, names)
        assert all(found) or not any(found)
