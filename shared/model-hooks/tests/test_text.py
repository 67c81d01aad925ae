"""Text from every kind of source, packed exactly, and one line for what cannot be read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model_hooks import RequestError
from model_hooks.text import load_sequences, pack, read_documents
from model_hooks.zoo import tokenizer

TEXTS = ["first text\n", "second, with é and ∑\n", "third"]


@pytest.fixture(scope="module")
def bpe() -> Any:
    return tokenizer.load()


def write(path: Path, kind: str) -> Path:
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    elif kind == "json":
        path.write_text(json.dumps([{"text": t, "id": 7} for t in TEXTS]))
    elif kind == "gz":
        with gzip.open(path, "wt") as file:
            file.write("".join(json.dumps(t) + "\n" for t in TEXTS))
    elif kind == "parquet":
        parquet, table = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow").table
        parquet.write_table(table({"text": TEXTS, "id": [1, 2, 3]}), path)
    else:
        pytest.importorskip("datasets").Dataset.from_dict({"text": TEXTS}).save_to_disk(str(path))
    return path


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.jsonl", "jsonl"), ("a.json", "json"), ("a.jsonl.gz", "gz"), ("a.parquet", "parquet"), ("folder", "folder")],
)
def test_records_of_every_kind_read_alike(tmp_path: Path, name: str, kind: str) -> None:
    assert list(read_documents(write(tmp_path / name, kind))) == TEXTS


def test_a_text_file_is_one_document_and_the_zoo_has_many(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(TEXTS))
    assert list(read_documents(tmp_path / "a.txt")) == ["".join(TEXTS)]
    assert len(list(read_documents("zoo:heldout"))) > 10


def test_fields_are_joined_where_none_is_called_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "Why?", "n": 3, "answer": "So."}) + "\n\n")
    assert list(read_documents(tmp_path / "a.jsonl")) == ["Why?\nSo."]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt holds no text"),
        ("a.txt", b"fine\nca\xe9\n", r"a\.txt:2: not UTF-8 \(byte 2 of the line\)"),
        ("a.jsonl", b'{"text": "x"}\n{"text"\n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b'{"n": 3}\n', r"a\.jsonl:1: no text in it"),
        ("a.json", b'{"text": "x"}', "a list of records is expected"),
        ("a.json", b'[{"text": "x"},\n{"text"]', r"a\.json:2: not JSON"),
        ("a.parquet", b"no", "not a Parquet file"),
        ("a.csv", b"x", "unknown kind of file"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("datasets")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=message) as caught:
        list(read_documents(tmp_path / name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["missing.jsonl", "./missing", "zoo:tests"])
def test_what_is_not_there_is_named(source: str) -> None:
    with pytest.raises(RequestError, match=r"no file|the zoo has"):
        list(read_documents(source))


@given(st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=8), st.integers(2, 16), st.integers(1, 5))
def test_packing_is_the_joined_stream_cut(bpe: Any, texts: list[str], length: int, sequences: int) -> None:
    stream = [i for t in texts for i in [*bpe(t, add_special_tokens=False)["input_ids"], bpe.eos_token_id]]
    ids, seen = pack(bpe, texts, sequences, length)
    full = min(len(stream) // length, sequences)
    assert ids.shape == (full, length)
    assert ids.flatten().tolist() == stream[: full * length]
    assert full * length <= seen <= len(stream)


def test_a_seed_chooses_among_the_first_and_none_takes_the_first(bpe: Any) -> None:
    first = load_sequences(bpe, "zoo:calibration", samples=4, length=32)
    pool = load_sequences(bpe, "zoo:calibration", samples=64, length=32)
    assert torch.equal(first, pool[:4])
    chosen = load_sequences(bpe, "zoo:calibration", samples=4, length=32, seed=1)
    assert torch.equal(chosen, load_sequences(bpe, "zoo:calibration", samples=4, length=32, seed=1))
    assert not torch.equal(chosen, first)
    assert {tuple(r) for r in chosen.tolist()} <= {tuple(r) for r in pool.tolist()}


def test_too_little_text_says_how_much_there_was(bpe: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(RequestError, match=r"too short: \d+ tokens found, 512 are needed"):
        load_sequences(bpe, tmp_path / "a.txt", samples=4, length=512)
    with pytest.raises(RequestError, match="at least 1 sequence of 2 tokens"):
        load_sequences(bpe, "zoo:calibration", samples=0, length=512)
