"""Schemas and their common view, ids, skipping, and everything that can be read as records."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instruct_data.ids import SeenIds
from instruct_data.records import BadRecord, DuplicateIds, Example, Records, read
from instruct_data.schemas import SCHEMAS
from model_hooks.errors import RequestError

DATA = Path(__file__).parents[3].parent / "shared" / "data"
ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}
TURNS = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "")]
VIEW = (
    Example("Hi", "", "Hello", (), "Be brief."),
    Example("Bye", "", "", (("Hi", "Hello"),), "Be brief."),
)


def turns(role: str, text: str, names: dict[str, str] | None = None) -> list[dict[str, str]]:
    return [{role: (names or {}).get(who, who), text: said} for who, said in TURNS]


SHAREGPT = turns("from", "value", {"user": "human", "assistant": "gpt"})


@pytest.mark.parametrize(
    ("schema", "data", "view"),
    [
        ("alpaca", ALPACA, (Example("Add.", "1 2", "3"),)),
        ("alpaca", {"instruction": "", "output": ""}, (Example("", "", ""),)),
        ("alpaca", {"instruction": "a", "input": None, "output": " b\n"}, (Example("a", "", " b\n"),)),
        (
            "alpaca",
            {**ALPACA, "ppl_A_direct": 1.5, "ppl_A_condition": None, "ifd_ppl": None},
            (Example("Add.", "1 2", "3"),),
        ),
        ("sharegpt", {"conversations": SHAREGPT}, VIEW),
        ("messages", {"messages": turns("role", "content"), "input": 5}, VIEW),
        ("messages", {"messages": [*turns("role", "content"), {"role": "user", "content": "unanswered"}]}, VIEW),
        ("items", {"id": 0, "items": [{**turn, "category": "open_qa", "evidence": ["e"]} for turn in SHAREGPT]}, VIEW),
        (
            "instances",
            {"instruction": "i", "instances": [{"input": "", "output": "x"}, {"output": "y"}]},
            (Example("i", "", "x"), Example("i", "", "y")),
        ),
    ],
)
def test_each_schema_is_detected_and_gives_the_common_view(
    schema: str, data: dict[str, Any], view: tuple[Example, ...]
) -> None:
    for wanted in ("auto", schema):
        records = read([data], wanted)
        (record,) = records
        assert records.schema.name == schema
        assert record.examples == view
        assert record.data is data


def changed(key: str, at: int | None = None, **values: Any) -> dict[str, Any]:
    """A good conversation with one turn changed, or cut down to its beginning."""
    role, text = ("role", "content") if key == "messages" else ("from", "value")
    names = None if key == "messages" else {"user": "human", "assistant": "gpt"}
    found: list[Any] = turns(role, text, names)
    if at is not None:
        found[at] = {name: value for name, value in {**found[at], **values}.items() if value != "gone"}
    return {key: found}


@pytest.mark.parametrize(
    ("schema", "data", "key", "reason"),
    [
        ("alpaca", {"instruction": "a"}, "output", "is missing"),
        ("alpaca", {"output": "a"}, "instruction", "is missing"),
        ("alpaca", {"instruction": None, "output": "a"}, "instruction", "is null, must be a string"),
        ("alpaca", {"instruction": "a", "output": 3.5}, "output", "is a number, must be a string"),
        ("alpaca", {"instruction": "a", "input": ["b"], "output": "c"}, "input", "is a list, must be a string"),
        ("alpaca", {"instruction": "a", "output": "b", "id": 1.5}, "id", "is 1.5, must be a string or a whole number"),
        ("alpaca", {"instruction": "a", "output": "b", "id": True}, "id", "is True, must be"),
        ("sharegpt", {"conversations": []}, "conversations", "is empty"),
        ("sharegpt", {"conversations": "a plain string"}, "conversations", "is a string, must be a list"),
        ("sharegpt", {"conversations": ["a", "b"]}, "conversations[0]", "is a string, must be an object"),
        ("sharegpt", changed("conversations", 2, **{"from": "human"}), "conversations[2].from", "'human' out of turn"),
        ("sharegpt", changed("conversations", 1, **{"from": "gpt"}), "conversations[1].from", "'gpt' out of turn"),
        ("sharegpt", changed("conversations", 3, **{"from": "system"}), "conversations[3].from", "out of turn"),
        (
            "sharegpt",
            changed("conversations", 2, **{"from": "tool"}),
            "conversations[2].from",
            "'tool', must be one of",
        ),
        ("items", changed("items", 4, value=None), "items[4].value", "is null, must be a string"),
        ("items", changed("items", 1, **{"from": "gone"}), "items[1].from", "is missing; beside it there is 'value'"),
        ("messages", changed("messages", 2, content=[{"type": "text"}]), "messages[2].content", "is a list, must be"),
        ("messages", {"messages": [{"role": "user", "content": "a"}]}, "messages", "has no answer"),
        ("messages", {"messages": None}, "messages", "is null, must be a list"),
        ("instances", {"instruction": "a", "instances": [{"input": "b"}]}, "instances[0].output", "is missing"),
    ],
)
def test_a_bad_value_is_named_by_place_record_id_and_key(
    schema: str, data: dict[str, Any], key: str, reason: str
) -> None:
    records = read([data], schema, name="my list")
    with pytest.raises(BadRecord) as caught:
        list(records)
    error = caught.value
    assert (error.key, error.index, error.where.file, error.data) == (key, 0, "my list", data)
    assert reason in error.reason
    known = "" if key == "id" else ', id "0"'
    assert str(error).startswith(f"my list, record 0{known}, key {json.dumps(key)}: ")
    assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("wanted", "data", "message"),
    [
        ("auto", {"question": "a", "answer": "b"}, "have question, answer, which fits no schema; known are alpaca"),
        (
            "auto",
            {**ALPACA, "messages": turns("role", "content")},
            r"more than one schema \(alpaca, messages\).*--schema",
        ),
        ("messages", ALPACA, "lack messages; they have instruction, input, output and look like alpaca"),
        ("chatml", ALPACA, "schema 'chatml' is none of auto, alpaca, sharegpt, messages, items, instances"),
    ],
)
def test_a_schema_that_does_not_fit_is_one_clear_line(wanted: str, data: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read([data] * 3, wanted)


def test_the_majority_of_the_first_records_decides_the_schema() -> None:
    records = read([{"instruction": "no output"}, {"odd": 1}, ALPACA])
    assert records.schema is SCHEMAS["alpaca"]
    with pytest.raises(BadRecord, match='key "output": is missing'):
        list(records)


def numbered(*ids: Any) -> list[dict[str, Any]]:
    return [dict(ALPACA) if id == "none" else {**ALPACA, "id": id} for id in ids]


def test_ids_are_text_or_numbers_and_stay_what_they_are() -> None:
    records = list(read(numbered(7, "x", "none", None, "é\ud800", 10**30)))
    assert [record.id for record in records] == ["7", "x", "2", "3", "é\ud800", str(10**30)]
    assert [record.data.get("id", "none") for record in records] == [7, "x", "none", None, "é\ud800", 10**30]


def test_duplicate_ids_fail_with_the_first_five() -> None:
    records = read(numbered(*"abcdefg", *"abcdefg"), name="letters")
    with pytest.raises(DuplicateIds) as caught:
        records.count()
    assert [id for id, _ in caught.value.first] == list("abcde")
    assert caught.value.exit_code == 2
    assert 'the first five: "a" (letters), "b"' in str(caught.value)
    with pytest.raises(DuplicateIds, match='bears, "1" '):
        read(numbered(1, 2, "1", 3)).count()
    with pytest.raises(DuplicateIds, match='"1"'):  # the second record has no id and takes its position
        read(numbered("none", "none", 1)).count()


def test_reid_numbers_anew_and_keeps_the_kind_of_the_id() -> None:
    records = list(read(numbered("a", "a", 5, 5, "none", None), reid=True))
    assert [record.id for record in records] == ["0", "1", "2", "3", "4", "5"]
    assert [record.data.get("id", "none") for record in records] == ["0", "1", 2, 3, "none", None]


@given(
    st.lists(st.one_of(st.integers(-3, 40).map(str), st.text(max_size=2), st.just("007")), max_size=200),
    st.integers(0, 30),
)
def test_seen_ids_is_a_set(ids: list[str], counted: int) -> None:
    ids = [*map(str, range(counted)), *ids]
    seen, oracle = SeenIds(), set[str]()
    for id in ids:
        assert seen.add(id) == (id not in oracle)
        oracle.add(id)


def test_seen_ids_grow_and_plain_numbers_cost_nothing() -> None:
    seen = SeenIds()
    assert all(seen.add(str(number)) for number in range(5000))
    assert not seen.used
    assert all(seen.add(f"id-{number}") for number in range(20_000))
    assert not any(seen.add(f"id-{number}") for number in range(20_000))
    assert 20_000 <= seen.used < len(seen.table) <= 2**15
    assert not seen.add("4999")
    assert seen.add("5000")


MIXED = [ALPACA, {"instruction": "a"}, 5, {**ALPACA, "id": "0"}, {**ALPACA, "id": "k", "output": float("nan")}, ALPACA]


def test_skip_goes_on_and_writes_rejects(tmp_path: Path) -> None:
    rejects = tmp_path / "out" / "rejects.jsonl"
    records = read(MIXED, name="mixed", on_bad_record="skip", rejects=rejects)
    for _ in range(2):
        assert [record.index for record in records] == [0, 5]
        assert (records.count(), records.rejected) == (2, 4)
    lines = [json.loads(line, parse_constant=pytest.fail) for line in rejects.read_text().splitlines()]
    assert [(line["index"], line["id"], line["key"]) for line in lines] == [
        (1, "1", "output"),
        (2, None, None),
        (3, "0", "id"),
        (4, "k", "output"),
    ]
    assert [line["record"] for line in lines[:3]] == MIXED[1:4]
    assert lines[3]["record"]["output"] is None
    assert all(line["file"] == "mixed" and line["reason"] for line in lines)
    assert [path.name for path in rejects.parent.iterdir()] == ["rejects.jsonl"]


def test_an_abandoned_pass_leaves_no_rejects_and_a_clean_one_an_empty_file(tmp_path: Path) -> None:
    rejects = tmp_path / "rejects.jsonl"
    iterator = iter(read(MIXED, on_bad_record="skip", rejects=rejects))
    next(iterator)
    iterator.close()  # type: ignore[attr-defined]
    assert list(tmp_path.iterdir()) == []
    assert read([ALPACA], on_bad_record="skip", rejects=rejects).count() == 1
    assert rejects.read_text() == ""


def test_only_bad_records_are_an_error_and_are_all_in_the_rejects(tmp_path: Path) -> None:
    rejects = tmp_path / "rejects.jsonl"
    records = read([{"instruction": "a"}, {"instruction": "b"}], on_bad_record="skip", rejects=rejects)
    with pytest.raises(RequestError, match=r"no good record: all 2 were bad, see .*rejects\.jsonl"):
        records.count()
    assert len(rejects.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: read([]), "list holds no record"),
        (lambda: read(iter([ALPACA])), "cannot be read more than once"),
        (lambda: read(ALPACA), "cannot be read more than once"),
        (lambda: read(5, name="five"), "five cannot be read"),
        (lambda: read([3, 4]), "record 0: is of type int, must be an object"),
        (lambda: read([ALPACA], on_bad_record="ignore"), "'ignore'; give fail or skip"),
        (lambda: read([ALPACA], on_bad_record="skip"), "needs a file to write them to"),
        (lambda: read([ALPACA], encoding_errors="ignore"), "'ignore'; give strict or replace"),
    ],
)
def test_a_wrong_request_is_one_clear_line(ask: Callable[[], Records], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ask()


@pytest.mark.parametrize(
    ("file", "schema", "count", "answers"),
    [
        ("alpaca_cherry_5pct.json", "alpaca", 3111, 3111),
        ("self_instruct_seed_tasks.jsonl", "instances", 175, 175),
        ("nq_factuality_100.json", "items", 100, 100),
    ],
)
def test_real_files(file: str, schema: str, count: int, answers: int) -> None:
    path = DATA / file
    if not path.exists():
        pytest.skip(f"{file} is not in ../shared/data")
    records = read(path)
    assert (records.schema.name, records.count()) == (schema, count)
    assert sum(len(record.examples) for record in records) == answers
    text = path.read_text()
    oracle = json.loads(text) if file.endswith(".json") else list(map(json.loads, text.splitlines()))
    assert [record.data for record in records] == oracle
