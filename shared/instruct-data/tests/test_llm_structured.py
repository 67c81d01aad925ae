"""Replies of every kind that models give, and the object that is read from them."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instruct_data.json_stream import dump
from instruct_data.llm import Form, ParseError, Reply, Request, ask_parsed
from instruct_data.llm.structured import check, first_object

SCHEMA = {
    "type": "object",
    "properties": {"suitable": {"type": "boolean"}, "revised_response": {"type": "string"}},
    "required": ["revised_response"],
}
FORM = Form(SCHEMA, (("Reasoning", "reasoning"), ("Revised response", "revised_response")))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"revised_response": "a"}', "a"),
        ('Sure!\n```json\n{"suitable": true, "revised_response": "a } b"}\n```', "a } b"),
        ('{broken {"revised_response": "inner"}', "inner"),
        ('{"revised_response": "two\nlines"}', "two\nlines"),
        ("Reasoning: it fits.\nRevised response: the text\nof two lines", "the text\nof two lines"),
        ("**reasoning:** x\n\n**Revised Response:**\n1. a\n2. b", "1. a\n2. b"),
        ("Reasoning: so\r\nREVISED RESPONSE: ok\r\n", "ok"),
        ("Reasoning: x\nRevised response: first\nRevised response: again", "first\nRevised response: again"),
        ("Reasoning: code\nRevised response:\nd = {}\nd[1] = 2", "d = {}\nd[1] = 2"),
        ("Reasoning: `{}` stays\nRevised response: int main(){}", "int main(){}"),
        ("Reasoning: x\nRevised response: $\\frac{}{2}$", "$\\frac{}{2}$"),
        ('Reasoning: x\nRevised response: {"suitable": 1}', '{"suitable": 1}'),
    ],
)
def test_what_is_found(text, found):
    assert FORM.parse(text)["revised_response"] == found


@pytest.mark.parametrize(
    "text",
    [
        "", "no labels", '{"revised_response": 3}', '{"suitable": "yes", "revised_response": "a"}', '{"other": 1}',
        "[1, 2]", "Revised response: without the first label", "the Reasoning: and Revised response: inside a line",
        '{"revised_response": "cut',
    ],
)  # fmt: skip
def test_what_is_refused(text):
    with pytest.raises(ParseError):
        FORM.parse(text)


@given(st.dictionaries(st.text(max_size=4), st.text(max_size=9)), st.text("ab \n:[]", max_size=9))
def test_an_object_is_found_in_any_prose(value, prose):
    assert first_object(prose + dump(value).decode() + "}" + prose) == value


def test_enums_numbers_and_paths_are_checked():
    with pytest.raises(ParseError, match=r"a\[1\].b is of type bool, must be number"):
        check(
            {"a": [{"b": 1}, {"b": True}]}, {"properties": {"a": {"items": {"properties": {"b": {"type": "number"}}}}}}
        )
    with pytest.raises(ParseError, match="none of the accepted"):
        check("c", {"enum": ["a", "b"]})


def asked(*texts, finish="stop"):
    sent = []

    async def ask(request):
        sent.append(request)
        text = texts[len(sent) - 1]
        return Reply(text, finish, error="" if text is not None else "boom")

    request = Request("rewrite", "m", ({"role": "user", "content": "q"},))
    return asyncio.run(ask_parsed(ask, request, FORM.parse)), sent


def test_one_more_try_that_says_what_was_wrong():
    parsed, sent = asked("nonsense", '{"revised_response": "a"}')
    assert parsed.value == {"revised_response": "a"}
    assert [m["role"] for m in sent[1].messages] == ["user", "assistant", "user"]
    assert "does not hold a JSON object" in sent[1].messages[-1]["content"]
    assert sent[0].key != sent[1].key
    parsed, sent = asked("nonsense", "nonsense again", '{"revised_response": "too late"}')
    assert (parsed.value, parsed.problem, len(sent)) == (None, "parse_failed", 2)


def test_failed_and_truncated_replies_are_not_parsed():
    assert asked(None)[0].problem == "failed"
    parsed, sent = asked('{"revised_response": "a"}', finish="length")
    assert (parsed.value, parsed.problem, len(sent)) == (None, "truncated", 1)
