"""Records that need no download, and reading only the first so many."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instruct_data.records import BadRecord, read
from instruct_data.zoo import SPLITS, pairs
from model_hooks import zoo
from model_hooks.errors import RequestError


@pytest.mark.parametrize("split", ["calibration", "heldout"])
def test_records_are_the_zoos_pairs(split: str) -> None:
    records = read(f"zoo:pairs:{split}")
    assert records.schema.name == "alpaca"
    found = [(r.examples[0].instruction, r.examples[0].response) for r in records]
    assert found == list(zoo.pairs(split))
    assert [r.id for r in records] == [f"{split}-{n}" for n in range(len(found))]
    assert all(r.examples[0].input == "" and r.data["output"] for r in records)


def test_the_calibration_pairs_are_meant_where_no_split_is_named() -> None:
    assert pairs("zoo:pairs") == pairs("zoo:pairs:calibration")


@pytest.mark.slow
def test_nothing_that_is_held_out_is_learned_from(request: pytest.FixtureRequest) -> None:
    gc.disable()  # it would look for cycles in a syntax tree for every module of the standard library
    request.addfinalizer(gc.enable)
    texts = {split: {(r["instruction"], r["output"]) for r in pairs(f"zoo:pairs:{split}")} for split in SPLITS}
    assert all(texts.values())
    assert not texts["heldout"] & (texts["train"] | texts["calibration"])


@pytest.mark.parametrize("name", ["zoo:pairs:test", "zoo:gpt2", "zoo:", "zoo:pair:heldout"])
def test_other_names_are_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(RequestError, match="the zoo has zoo:pairs:calibration, zoo:pairs:heldout, zoo:pairs:train"):
        read(name)


def test_a_file_of_such_a_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("zoo:mine.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    assert read("zoo:mine.jsonl").count() == 1


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@given(st.integers(1, 12), st.integers(1, 15), st.sampled_from(["jsonl", "json", "parquet", "list"]))
def test_only_the_first_so_many(tmp_path_factory: Any, count: int, limit: int, form: str) -> None:
    rows = [{"instruction": f"i{n}", "output": f"o{n}"} for n in range(count)]
    path = tmp_path_factory.getbasetemp() / f"rows.{form}"
    if form == "jsonl":
        lines(path, rows)
    elif form == "json":
        path.write_text(json.dumps(rows))
    elif form == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    records = read(rows if form == "list" else path, limit=limit)
    for _ in range(2):  # each pass begins anew
        assert [record.data for record in records] == rows[:limit]
    assert records.count() == min(count, limit)


def test_what_comes_after_the_limit_is_not_read(tmp_path: Path) -> None:
    good = {"instruction": "a", "output": "b"}
    path = lines(tmp_path / "rows.jsonl", [good, good, "{torn", good])
    assert read(path, limit=2).count() == 2
    with pytest.raises(BadRecord, match="line 3"):
        read(path, limit=3).count()


def test_bad_records_count_within_the_limit(tmp_path: Path) -> None:
    good = {"instruction": "a", "output": "b"}
    path = lines(tmp_path / "rows.jsonl", [good, "{torn", good, good])
    records = read(path, limit=3, on_bad_record="skip", rejects=tmp_path / "rejects.jsonl")
    assert [record.index for record in records] == [0, 2]
    assert records.rejected == 1


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(limit: int) -> None:
    with pytest.raises(RequestError, match=f"limit {limit}"):
        read([{"instruction": "a", "output": "b"}], limit=limit)
