"""Another answer, another instruction; everything else as it was."""

from __future__ import annotations

import copy

import pytest

from instruct_data import read
from instruct_data.editing import edited
from model_hooks import RequestError

TURNS = [("system", "s"), ("human", "q1"), ("gpt", "a1"), ("human", "q2"), ("gpt", "a2")]
RECORDS = {
    "alpaca": {"output": "a2", "id": 1, "instruction": "q2", "input": "in", "more": [1]},
    "sharegpt": {"conversations": [{"from": w, "value": t, "x": 1} for w, t in TURNS], "id": 1},
    "items": {"id": 1, "items": [{"from": w, "value": t} for w, t in TURNS]},
    "messages": {"messages": [
        {"role": {"human": "user", "gpt": "assistant"}.get(w, w), "content": t} for w, t in TURNS
    ]},
    "instances": {"instruction": "q2", "instances": [{"input": "1", "output": "a1"}, {"input": "2", "output": "a2"}]},
}  # fmt: skip


@pytest.mark.parametrize("schema", RECORDS)
def test_the_record_reads_as_edited_and_nothing_else_changes(schema):
    data = RECORDS[schema]
    before = copy.deepcopy(data)
    made = edited(schema, data, response="new", instruction="asked")
    assert data == before
    assert list(made) == list(data)
    (record,) = read([made], schema)
    old = next(iter(read([data], schema))).examples
    assert (record.examples[-1].response, record.examples[-1].instruction, record.examples[-1].input) == (
        "new", "asked", "",
    )  # fmt: skip
    assert len(record.examples) == len(old)
    if len(old) > 1:
        assert record.examples[0].response == old[0].response
        assert next(iter(read([edited(schema, data, response="new", at=0)], schema))).examples[0].response == "new"
    assert edited(schema, data) == data


def test_an_unknown_schema_is_refused():
    with pytest.raises(RequestError, match="none of"):
        edited("csv", {}, response="x")
