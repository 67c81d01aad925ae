"""Writing: what was read comes back equal in every format, whole or not at all, in strict JSON."""

from __future__ import annotations

import gzip
import json
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instruct_data.records import Records, read
from instruct_data.writing import write
from model_hooks.errors import RequestError

JSON = ["a.json", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json.gz"]
ARROW = ["a.parquet", "folder"]
TEXT = st.text(max_size=6)
ANY_TEXT = st.text(st.characters(exclude_categories=[]), max_size=6)  # lone surrogates, too
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=5,
)


def fields(schema: str, text: st.SearchStrategy[str]) -> st.SearchStrategy[dict[str, Any]]:
    """The keys of a good record of each schema."""

    def conversation(key: str, role: str, said: str, user: str, assistant: str) -> st.SearchStrategy[dict[str, Any]]:
        pair = st.tuples(text, text).map(lambda two: [{role: user, said: two[0]}, {role: assistant, said: two[1]}])
        return st.fixed_dictionaries({key: st.lists(pair, min_size=1, max_size=2).map(lambda two: list(chain(*two)))})

    return {
        "alpaca": st.fixed_dictionaries({"instruction": text, "output": text}, optional={"input": text | st.none()}),
        "sharegpt": conversation("conversations", "from", "value", "human", "gpt"),
        "messages": conversation("messages", "role", "content", "user", "assistant"),
        "items": conversation("items", "from", "value", "human", "gpt"),
    }[schema]


def shuffled(draw: st.DrawFn, record: dict[str, Any]) -> dict[str, Any]:
    return dict(draw(st.permutations(list(record.items()))))


@st.composite
def any_rows(draw: st.DrawFn, schema: str) -> list[dict[str, Any]]:
    """Records whose other keys differ from record to record, in any order, with ids of both kinds."""
    side = st.dictionaries(ANY_TEXT.map("x".__add__), VALUES, max_size=3)
    several = draw(st.lists(st.tuples(fields(schema, ANY_TEXT), side), min_size=1, max_size=4))
    return [
        shuffled(draw, {**body, **more, **draw(st.sampled_from([{}, {"id": at}, {"id": f"{at}"}]))})
        for at, (body, more) in enumerate(several)
    ]


@st.composite
def typed_rows(draw: st.DrawFn, schema: str) -> list[dict[str, Any]]:
    """Records with the same keys in the same order, and one type a column."""
    kinds = st.sampled_from(
        [
            st.integers(-(2**63), 2**63 - 1),
            st.floats(allow_nan=False),
            TEXT,
            st.booleans(),
            st.none(),
            st.lists(TEXT | st.none(), max_size=2),
            st.tuples(st.integers(0, 5) | st.none(), st.lists(st.floats(0, 1), max_size=2)).map(
                lambda two: dict(zip("pq", two))
            ),
        ]
    )
    side = draw(st.dictionaries(st.text("aé.", max_size=3).map("x".__add__), kinds, max_size=3))
    several = draw(st.lists(fields(schema, TEXT), min_size=1, max_size=4))
    keys = list(dict.fromkeys(key for body in several for key in body))
    order = draw(st.permutations(["id", *keys, *side]))
    rows = []
    for at, body in enumerate(several):
        row = {"id": at, **dict.fromkeys(keys), **body, **{key: draw(kind | st.none()) for key, kind in side.items()}}
        rows.append({key: row[key] for key in order})
    return rows


def content(records: Records) -> str:
    """All there is in records, as text in which 1, 1.0, True and "1" differ and the order of keys counts."""
    return repr([record.data for record in records])


@pytest.mark.parametrize("schema", ["alpaca", "sharegpt", "messages", "items"])
@given(data=st.data())
@settings(max_examples=15)
def test_records_come_back_equal_from_json(
    schema: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("json")
    rows = data.draw(any_rows(schema))
    before = read(rows, schema)
    for name in JSON:
        assert write(folder / name, before, like=before) == len(rows)
        assert content(read(folder / name, schema)) == repr(rows)
    lines = (folder / "a.jsonl").read_bytes().split(b"\n")
    assert repr([json.loads(line, parse_constant=pytest.fail) for line in lines[:-1]]) == repr(rows)


@pytest.mark.parametrize("schema", ["alpaca", "sharegpt", "messages", "items"])
@given(data=st.data())
@settings(max_examples=10)
def test_records_come_back_equal_from_every_format_by_way_of_every_other(
    schema: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("all")
    rows = data.draw(typed_rows(schema))
    names = data.draw(st.permutations([*JSON[:3], *ARROW]))
    records = read(rows, schema)
    for name in names:
        write(folder / name, records, like=records)
        records = read(folder / name, schema)
        assert content(records) == repr(rows)


@pytest.mark.parametrize("name", ARROW)
def test_arrow_keeps_its_types_fields_and_metadata_and_adds_columns_behind(name: str, tmp_path: Path) -> None:
    schema = pa.schema(
        [
            pa.field("output", pa.large_string(), nullable=False),
            pa.field("instruction", pa.string()),
            pa.field("n", pa.int8()),
            pa.field("f", pa.float32()),
            pa.field("when", pa.timestamp("us")),
            pa.field("raw", pa.binary()),
            pa.field("none", pa.null()),
        ],
        {"note": "kept"},
    )
    row = {"output": "o", "instruction": "i", "n": 3, "f": 0.5, "when": None, "raw": b"\xff", "none": None}
    pq.write_table(pa.Table.from_pylist([row, {**row, "n": None}], schema), tmp_path / "in.parquet")
    records = read(tmp_path / "in.parquet")
    added = ({**record.data, "ifd_ppl": None, "status": "ok", "parts": [{"a": record.index}]} for record in records)
    assert write(tmp_path / name, added, like=records, types={"ifd_ppl": pa.float64()}) == 2
    after = read(tmp_path / name)
    assert after.arrow is not None
    fields = list(after.arrow)
    if name == "folder":  # `datasets` has no columns that may not be null
        assert [(field.name, field.type) for field in fields[:7]] == [(field.name, field.type) for field in schema]
    else:
        assert fields[:7] == list(schema)
        assert pq.read_schema(tmp_path / name).metadata[b"note"] == b"kept"
    kinds = [pa.float64(), pa.string(), pa.list_(pa.struct([("a", pa.int64())]))]
    assert [(field.name, field.type) for field in fields[7:]] == list(zip(["ifd_ppl", "status", "parts"], kinds))
    assert [record.data["parts"] for record in after] == [[{"a": 0}], [{"a": 1}]]
    assert next(iter(after)).data["raw"] == b"\xff"


def test_types_are_found_over_all_records_not_the_first(tmp_path: Path) -> None:
    rows = [{"instruction": "", "output": "", "x": None, "y": 1, "z": []} for _ in range(600)]
    rows[580].update(x={"k": 1}, y=2.5, z=["s"], late=7)
    rows[590].update(x={"m": "v"})
    write(tmp_path / "a.parquet", rows)
    found = [record.data for record in read(tmp_path / "a.parquet")]
    assert found[580] == {**rows[580], "x": {"k": 1, "m": None}}
    assert found[590]["x"] == {"k": None, "m": "v"}
    assert found[0] == {**rows[0], "late": None}


def test_the_folder_is_one_of_datasets(tmp_path: Path) -> None:
    rows = [{"instruction": "a", "output": "b", "n": at} for at in range(5)]
    write(tmp_path / "d", rows)
    loaded = datasets.load_from_disk(tmp_path / "d")
    assert loaded.to_list() == rows
    assert loaded.map(lambda row: {"m": row["n"] + 1})["m"] == [1, 2, 3, 4, 5]
    write(tmp_path / "same", rows)
    write(tmp_path / "other", rows[:4])
    prints = [datasets.load_from_disk(tmp_path / name)._fingerprint for name in ("d", "same", "other")]
    assert prints[0] == prints[1] != prints[2]  # `datasets` finds its cached results by it


def test_large_tables_come_in_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("instruct_data.writing.GROUP_ROWS", 1000)
    write(tmp_path / "a.parquet", [{"instruction": str(at), "output": ""} for at in range(3000)])
    file = pq.ParquetFile(tmp_path / "a.parquet")
    assert [file.metadata.row_group(at).num_rows for at in range(file.num_row_groups)] == [1024, 1024, 952]
    assert [record.data["instruction"] for record in read(tmp_path / "a.parquet")] == [str(at) for at in range(3000)]


def test_json_is_strict_readable_and_the_same_each_time(tmp_path: Path) -> None:
    row = {"o": "é\ud800", "a": float("nan"), "b": [np.float32("inf"), np.int64(3), {"c": -np.inf}], "d": "日本"}
    write(tmp_path / "a.jsonl.gz", [row])
    text = gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes())
    assert text == b'{"o": "\\u00e9\\ud800", "a": null, "b": [null, 3, {"c": null}], "d": "\\u65e5\\u672c"}\n'
    first = (tmp_path / "a.jsonl.gz").read_bytes()
    write(tmp_path / "a.jsonl.gz", [row], overwrite=True)
    assert (tmp_path / "a.jsonl.gz").read_bytes() == first
    write(tmp_path / "b.json", [{"d": "日本"}, {}])
    assert (tmp_path / "b.json").read_text() == '[\n{"d": "日本"},\n{}\n]\n'
    assert [write(tmp_path / name, []) for name in ("c.json", "c.jsonl", "c.parquet", "c")] == [0, 0, 0, 0]
    assert json.loads((tmp_path / "c.json").read_text()) == []
    assert (tmp_path / "c.jsonl").read_bytes() == b""


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("a.csv", [{}], "ends in no known format; give .json, .jsonl, .ndjson, .parquet"),
        ("a.jsonl", [{"a": 1}, {"a": b"x"}], "record 1 cannot be written to .*bytes is not JSON serializable"),
        ("a.parquet", [{"a": 1}, {"a": "x"}], "column 'a' fits no one type .*write .jsonl"),
        ("a.parquet", [{"a": 1}] * 300 + [{"a": "x"}], "column 'a' fits no one type"),
        ("a.parquet", [{"a": "\ud800"}], "column 'a' fits no one type .*surrogates"),
        ("a.parquet", [{"a": 2**70}], "column 'a' fits no one type"),
        ("a.parquet", [{"a": {}}], "cannot hold these columns"),
        ("d", [{"a": 1}, {"a": "x"}], "column 'a' fits no one type"),
    ],
)
def test_what_a_format_cannot_hold_is_one_clear_line_and_leaves_nothing(
    name: str, rows: list[dict[str, Any]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        write(tmp_path / name, rows)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [*JSON, *ARROW])
def test_a_failure_leaves_the_old_file_and_nothing_beside_it(name: str, tmp_path: Path) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield from [{"instruction": "new", "output": "x" * 1000}] * 700
        raise KeyboardInterrupt

    old = [{"instruction": "old", "output": ""}]
    write(tmp_path / name, old)
    with pytest.raises(RequestError, match="exists already"):
        write(tmp_path / name, old)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / name, rows(), overwrite=True)
    assert [record.data for record in read(tmp_path / name)] == old
    assert [path.name for path in tmp_path.iterdir()] == [name]


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes: writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", [*JSON, *ARROW])
def test_a_full_disk_names_the_path_and_leaves_the_old_file(name: str, tmp_path: Path) -> None:
    rows = [{"instruction": os.urandom(200).hex(), "output": ""} for _ in range(2000)]
    write(tmp_path / name, rows[:1])
    with small_disk(100_000), pytest.raises(OSError, match="the disk is full, nothing was written") as caught:
        write(tmp_path / name, rows, overwrite=True)
    assert caught.value.filename == str(tmp_path / name)
    assert [record.data for record in read(tmp_path / name)] == rows[:1]
    assert [path.name for path in tmp_path.iterdir()] == [name]
    write(tmp_path / name, rows, overwrite=True)
    assert read(tmp_path / name).count() == 2000


@pytest.mark.parametrize("name", ["a.json", "a.parquet"])
def test_kill_9_leaves_the_old_file(name: str, tmp_path: Path) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield from [{"instruction": "new", "output": "x" * 1000}] * 700
        os.kill(os.getpid(), signal.SIGKILL)

    old = [{"instruction": "old", "output": ""}]
    write(tmp_path / name, old)
    child = os.fork()
    if child == 0:
        try:
            write(tmp_path / name, rows(), overwrite=True)
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert [record.data for record in read(tmp_path / name)] == old


def test_a_file_can_be_written_over_itself(tmp_path: Path) -> None:
    for name in (*JSON, *ARROW):
        write(tmp_path / name, [{"instruction": str(at), "output": ""} for at in range(2000)])
        records = read(tmp_path / name)
        write(tmp_path / name, ({**record.data, "status": "ok"} for record in records), like=records, overwrite=True)
        after = [record.data for record in read(tmp_path / name)]
        assert after == [{"instruction": str(at), "output": "", "status": "ok"} for at in range(2000)]
