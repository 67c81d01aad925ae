"""Parts of a run, and a merge that notices whatever is wrong with them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instruct_data import read
from instruct_data.llm.shards import merge_parts, only, parse_shard, part_of, write_part
from model_hooks import RequestError
from model_hooks.errors import FingerprintMismatch

RECIPE = {"model": "m", "prompt_version": "1"}


def records(count=40, **changed):
    rows = [{"id": f"r{n}", "instruction": f"i{n}", "output": "o"} for n in range(count)]
    for n, text in changed.items():
        rows[int(n[1:])]["output"] = text
    return read(rows, name="rows")


def parts(folder, of=3, data=None, recipe=RECIPE):
    data, paths = data or records(), []
    for part in range(1, of + 1):
        paths.append(folder / f"{part}.jsonl")
        write_part(paths[-1], (part, of), recipe, ((r, {"new": r.id}) for r in only(data, (part, of))), overwrite=True)
    return paths


@given(st.text(), st.integers(1, 50))
def test_every_id_has_one_part(id, of):
    assert 1 <= part_of(id, of) <= of


def test_the_parts_are_the_same_on_every_machine():
    assert [part_of(f"r{n}", 4) for n in range(8)] == [3, 2, 2, 1, 1, 3, 2, 4]


@pytest.mark.parametrize("of", [1, 3, 60])
def test_a_merge_has_every_record_in_order(tmp_path, of):
    merged = list(merge_parts(records(), reversed(parts(tmp_path, of))))
    assert [(r.id, v) for r, v in merged] == [(f"r{n}", {"new": f"r{n}"}) for n in range(40)]


def test_what_is_wrong_with_parts_is_said(tmp_path):
    paths = parts(tmp_path)
    with pytest.raises(RequestError, match="missing: 2/3"):
        list(merge_parts(records(), [paths[0], paths[2]]))
    with pytest.raises(RequestError, match="given twice"):
        list(merge_parts(records(), [*paths, paths[0]]))
    with pytest.raises(RequestError, match="all"):
        list(merge_parts(records(), []))
    with pytest.raises(FingerprintMismatch, match="other records"):
        list(merge_parts(records(r7="changed"), paths))
    for count in (39, 41):
        with pytest.raises(FingerprintMismatch, match="other records"):
            list(merge_parts(records(count), paths))
    (tmp_path / "other").mkdir()
    foreign = parts(tmp_path / "other", recipe={**RECIPE, "model": "n"})
    with pytest.raises(FingerprintMismatch, match="model 'n'"):
        list(merge_parts(records(), [*paths[:2], foreign[2]]))
    with pytest.raises(RequestError, match="part of 2"):
        list(merge_parts(records(), [*paths[:2], parts(tmp_path / "other", of=2)[1]]))
    paths[1].write_bytes(paths[1].read_bytes()[:-30])
    with pytest.raises(RequestError):
        list(merge_parts(records(), paths))
    paths[1].write_text(json.dumps({"id": 1}) + "\n")
    with pytest.raises(RequestError, match="no part of a run"):
        list(merge_parts(records(), paths))


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/0", "-1/2", ""])
def test_shards_are_parsed(text):
    assert parse_shard("2/3") == (2, 3)
    with pytest.raises(RequestError, match="PART/OF"):
        parse_shard(text)
