"""Reading every format: equal to the plain parsers, in constant memory, with the exact place of every fault."""

from __future__ import annotations

import gc
import gzip
import io
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instruct_data import json_stream
from instruct_data.json_stream import Row, read_array, read_lines
from instruct_data.records import BadRecord, read
from instruct_data.writing import write
from model_hooks.errors import RequestError

GOOD = b'{"instruction": "a", "output": "b"}'
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
SPACE = st.text(" \n\t\r", max_size=3)


def rows(text: bytes, chunk: int = 1 << 20, errors: str = "strict") -> list[Row]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "CHUNK", chunk)
        return list(read_array(io.BytesIO(text), "f", errors))


@st.composite
def arrays(draw: st.DrawFn) -> tuple[bytes, list[Any], list[int]]:
    """A JSON array as text with any spacing, its elements, and the byte where each of them begins."""
    values = draw(st.lists(VALUES, max_size=5))
    text = draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + draw(SPACE).encode() + b"["
    starts = []
    for at, value in enumerate(values):
        text += draw(SPACE).encode()
        starts.append(len(text))
        layout = draw(st.sampled_from([{}, {"indent": 2}, {"ensure_ascii": False}]))
        text += json.dumps(value, **layout).encode(errors="surrogatepass") + draw(SPACE).encode()
        text += b"," if at < len(values) - 1 else b""
    return text + draw(SPACE).encode() + b"]" + draw(SPACE).encode(), values, starts


@given(arrays(), st.integers(1, 9))
def test_an_array_is_read_as_json_reads_it_in_chunks_of_any_size(
    array: tuple[bytes, list[Any], list[int]], chunk: int
) -> None:
    text, values, starts = array
    found = rows(text, chunk)
    assert [repr(row.data) for row in found] == [repr(value) for value in values]
    assert [row.where.offset for row in found] == starts
    assert [row.where.line for row in found] == [text[:start].count(b"\n") + 1 for start in starts]
    assert all(row.fault is None for row in found)


@given(arrays(), st.integers(1, 9), st.data())
def test_an_array_cut_anywhere_gives_its_whole_elements_and_one_fault(
    array: tuple[bytes, list[Any], list[int]], chunk: int, data: st.DataObject
) -> None:
    text, values, _ = array
    first, last = text.index(b"[") + 1, text.rindex(b"]")
    found = rows(text[: data.draw(st.integers(first, last))], chunk)
    assert [row.fault is None for row in found] == [True] * (len(found) - 1) + [False]
    assert "the file ends" in str(found[-1].fault)
    assert [repr(row.data) for row in found[:-1]] == [repr(value) for value in values[: len(found) - 1]]


@given(st.binary(max_size=40), st.integers(1, 9), st.sampled_from(["strict", "replace"]))
def test_no_bytes_at_all_break_the_readers(garbage: bytes, chunk: int, errors: str) -> None:
    """Any bytes between good records: faults are rows, places lie inside the text, nothing is raised."""
    array = b"[" + GOOD + b",\n" + garbage + b",\n" + GOOD + b"]"
    lines = GOOD + b"\n" + garbage + b"\n" + GOOD
    for text, found in ((array, rows(array, chunk, errors)), (lines, list(read_lines(io.BytesIO(lines), "f", errors)))):
        assert found[0].data == json.loads(GOOD)
        assert all(0 <= (row.where.offset or 0) <= len(text) for row in found)
        assert all((row.data is None) >= (row.fault is not None) for row in found)
    assert found[-1].data == json.loads(GOOD)  # a broken line never takes the next one with it


CASES = {
    # name: (text, line, column, byte, part of the reason); G is a good record of 35 bytes
    "line.jsonl": (b"G\n\nG\n{'a': 1}\n", 4, 2, 74, "malformed JSON: Expecting property name"),
    "cut.jsonl": (b'G\n{"instruction": "a", "outp', 2, 22, 57, "malformed JSON: Unterminated string"),
    "extra.jsonl": (b"G\n G G\n", 2, 38, 73, "malformed JSON: Extra data"),
    "crlf.jsonl": (b"G\r\n  {]\r\n", 2, 4, 40, "malformed JSON: Expecting property name"),
    "wide.jsonl": ('{"é": "日本" "x"}\n'.encode(), 1, 12, 16, "malformed JSON: Expecting ',' delimiter"),
    "bom.jsonl": (b'\xef\xbb\xbf{"a" 1}', 1, 6, 8, "malformed JSON: Expecting ':' delimiter"),
    "latin.jsonl": (b'G\n{"instruction": "caf\xe9"}\n', 2, 21, 56, "byte 0xe9 is not UTF-8; --encoding-errors replace"),
    "utf16.jsonl": (GOOD.decode().encode("utf-16"), 1, 1, 0, "byte 0xff is not UTF-8"),
    "pretty.jsonl": (b"[\nG,\nG\n]\n", 1, 2, 1, "a JSON array over several lines needs a name that ends in .json"),
    "middle.json": (b'[\n  G,\n  {"instruction": "a",,},\n  G\n]', 3, 23, 63, "malformed JSON: "),
    "comma.json": (b"[\n G\n G,G\n]", 3, 2, 40, "malformed JSON: Extra data"),
    "trailing.json": (b"[G,\n]", 2, 1, 38, "malformed JSON: Expecting value"),
    "cut.json": (b'[G,\n {"instruction": "a', 2, 18, 55, "Unterminated string.*: the file ends inside the array"),
    "open.json": (b"[G,\nG\n", 3, 1, 74, "the file ends before the array is closed"),
    "after.json": (b"[G]\n x", 2, 2, 39, "text after the end of the array"),
    "latin.json": (b'[G,\n{"instruction": "caf\xe9", "output": ""}]', 2, 21, 58, "byte 0xe9 is not UTF-8"),
    "lines.json": (b"G\n{]\n", 2, 2, 37, "malformed JSON: Expecting property name"),
    "deep.json": (b"[G,\n" + b"[" * 100_000 + b"]" * 100_000 + b"]", 2, 1, 38, "nested too deep"),
    "digits.jsonl": (b"G\n" + b"9" * 5000, 2, 1, 36, "malformed JSON: Exceeds the limit"),
}


def case(name: str, folder: Path) -> tuple[Path, bytes]:
    text = CASES[name][0].replace(b"G", GOOD)
    path = folder / name
    path.write_bytes(text)
    return path, text


@pytest.mark.parametrize("name", CASES)
def test_a_fault_in_the_text_has_its_line_column_and_byte(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    case(name, tmp_path)
    _, line, column, offset, reason = CASES[name]
    with pytest.raises(BadRecord, match=reason) as caught:
        list(read(name, "alpaca"))
    where = caught.value.where
    assert (where.file, where.line, where.column, where.offset) == (name, line, column, offset)
    assert str(caught.value).startswith(f"{name}, line {line}, column {column}, byte {offset}, record ")


@pytest.mark.parametrize("name", [name for name in CASES if b"G" in CASES[name][0] and name != "pretty.jsonl"])
def test_skip_reads_all_the_good_records_around_a_fault(name: str, tmp_path: Path) -> None:
    path, text = case(name, tmp_path)
    rejects = tmp_path / "rejects.jsonl"
    records = read(path, on_bad_record="skip", rejects=rejects)
    lost = 2 if name in ("extra.jsonl", "comma.json") else 0  # two records with nothing between them are one fault
    assert records.count() == text.count(GOOD) - lost
    (reject,) = map(json.loads, rejects.read_text().splitlines())
    assert (reject["line"], reject["column"], reject["offset"]) == CASES[name][1:4]
    assert reject["text"][:10].encode() in text or "\ufffd" in reject["text"]


def test_a_value_fault_is_at_the_beginning_of_its_record(tmp_path: Path) -> None:
    for name, text in (("a.json", b"[\n G,\n  H]"), ("a.jsonl", b"\nG\n  H\n")):
        (tmp_path / name).write_bytes(text.replace(b"G", GOOD).replace(b"H", b'{"id": "x\\ny", "instruction": "a"}'))
        with pytest.raises(BadRecord) as caught:
            list(read(tmp_path / name))
        where = caught.value.where
        assert (where.line, where.column, where.offset) == (3, None, len(GOOD) + text.index(b"H") - 1)
        assert 'record 1, id "x\\ny", key "output": is missing' in str(caught.value)


@pytest.mark.parametrize("name", ["latin.jsonl", "latin.json"])
def test_replace_reads_bytes_that_are_no_utf8(name: str, tmp_path: Path) -> None:
    text = CASES[name][0].replace(b"}\n", b', "output": ""}\n') if name == "latin.jsonl" else CASES[name][0]
    (tmp_path / name).write_bytes(text.replace(b"G", GOOD))
    records = list(read(tmp_path / name, encoding_errors="replace"))
    assert [record.data["instruction"] for record in records] == ["a", "caf\ufffd"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", b"", "is empty"),
        ("a.jsonl", b"", "is empty"),
        ("a.json", b" [ \n] ", "holds no record"),
        ("a.jsonl", b"\n\n \n", "holds no record"),
        ("a.json", b"[1, 2]", "record 0: is of type int, must be an object"),
        ("a.parquet", b"PAR1 and more", "is no whole Parquet file"),
        ("a.csv", b"a,b", "no file of records that is known by its name; give a .json"),
    ],
)
def test_a_file_without_records_is_one_clear_line(name: str, text: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(text)
    with pytest.raises(RequestError, match=message):
        read(tmp_path / name)


def test_a_byte_order_mark_and_bare_nan_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD[:-1] + b', "ifd_ppl": NaN, "loss": -Infinity}\r\n')
    (record,) = read(tmp_path / "a.jsonl")
    assert repr(record.data) == "{'instruction': 'a', 'output': 'b', 'ifd_ppl': nan, 'loss': -inf}"
    assert (record.where.line, record.where.offset) == (1, 3)


@pytest.mark.parametrize("ending", ["jsonl.gz", "json.gz", "jsonl.zst", "json.zst"])
def test_compressed_files_give_places_in_the_text_and_name_damage(ending: str, tmp_path: Path) -> None:
    data = [{"id": f"é{at}", "instruction": "a", "output": str(at * 7919)} for at in range(4000)]
    path = tmp_path / f"a.{ending}"
    write(path, data)
    records = list(read(path))
    assert [record.data for record in records] == data
    text = pa.CompressedInputStream(str(path), "gzip" if ending.endswith("gz") else "zstd").read()
    start = text.index('{"id": "é77"'.encode())
    assert (records[77].where.line, records[77].where.offset) == (text[:start].count(b"\n") + 1, start)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(BadRecord, match=r"the compressed file is damaged or cut off.* after line \d+"):
        list(read(path))
    path.write_bytes(b"nothing compressed")
    with pytest.raises(BadRecord, match="damaged or cut off"):
        read(path)


def test_several_gzip_members_are_one_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(GOOD + b"\n") + gzip.compress(GOOD))
    assert read(tmp_path / "a.jsonl.gz").count() == 2


def test_parquet_faults(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    binary = pa.array([b"good", b"caf\xe9 au lait", b"good"])
    text = pa.Array.from_buffers(pa.string(), 3, binary.buffers())
    pq.write_table(pa.table({"instruction": text, "output": text}), path)
    with pytest.raises(BadRecord, match=r"record 1: column instruction is not UTF-8 \(byte 0xe9 at 3"):
        list(read(path))
    records = read(path, on_bad_record="skip", rejects=tmp_path / "rejects.jsonl")
    assert [record.index for record in records] == [0, 2]

    pq.write_table(
        pa.table({"instruction": ["a"] * 9, "output": [str(at) for at in range(9)]}), path, compression="zstd"
    )
    data = bytearray(path.read_bytes())
    data[20:60] = b"\xff" * 40
    path.write_bytes(data)
    with pytest.raises(BadRecord, match="the file is damaged here"):
        list(read(path))

    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, names=["output", "output"]), path)
    with pytest.raises(RequestError, match=r"several columns of one name \(output\)"):
        read(path)


def growth(path: Path, many: int) -> int:
    """The most bytes by which this process grows in one pass over `many` records."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    gc.collect()
    before, most, count = resident(), 0, 0
    for record in read(path, "alpaca"):
        count += 1
        if record.index % 1000 == 0:
            most = max(most, resident() - before)
    assert count == many
    return most


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the process's size is read from Linux's /proc")
@pytest.mark.parametrize("ending", ["json", "jsonl", "parquet"])
def test_memory_is_flat_from_20_thousand_to_200_thousand_records(ending: str, tmp_path: Path) -> None:
    peaks = []
    for many in (20_000, 200_000):
        path = tmp_path / f"{many}.{ending}"
        number = range(many)
        if ending == "parquet":
            columns = {
                "id": [f"r{at}" for at in number],
                "instruction": [f"say {at}" for at in number],
                "output": ["x" * 80] * many,
            }
            pq.write_table(pa.table(columns), path)
        else:
            opening, between, closing = ("[", ",\n", "]") if ending == "json" else ("", "\n", "")
            line = '{"id": "r%d", "instruction": "say %d", "output": "' + "x" * 80 + '"}'
            path.write_text(opening + between.join(line % (at, at) for at in number) + closing)
        peaks.append(growth(path, many))
    assert peaks[1] < peaks[0] + 20e6  # 4 MB are the ids'; all the records would be more than 100 MB
