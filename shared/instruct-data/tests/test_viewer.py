"""The viewer's page as a file: what is embedded comes back value for value, and nothing of a record is markup."""

from __future__ import annotations

import gzip
import json
import math
import re
from base64 import b64decode, b64encode
from datetime import date
from hashlib import sha256
from html import escape

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instruct_data.viewer import columns, write_page
from instruct_data.viewer.values import flat, plain
from model_hooks import RequestError

BLOCK = re.compile(r'<script type="application/gzip" id="([\w-]+)">([A-Za-z0-9+/=]*)</script>')
GONE = object()


def constant(name):
    raise ValueError(f"{name} is no JSON")


def unpacked(path):
    """id -> value of every data block of a page, read as strictly as JSON is."""
    found = BLOCK.findall(path.read_text("utf-8"))
    return {name: json.loads(gzip.decompress(b64decode(text)), parse_constant=constant) for name, text in found}


def decoded(path):
    """The page's rows, from the embedded columns alone; and its head."""
    parts = unpacked(path)
    head = parts["head"]
    rows = [{} for _ in range(head["rows"])]
    for number, column in enumerate(head["columns"]):
        if column["kind"] == "text":
            values = [v for block in range(column["blocks"]) for v in parts[f"text-{number}-{block}"]]
        elif column["kind"] == "category":
            values = [None if code < 0 else column["values"][code] for code in column["codes"]]
        else:
            values = column["values"]
        assert len(values) == head["rows"]
        for row, value in enumerate(values):
            if row not in column.get("missing", []):
                rows[row][column["name"]] = value
    return rows, head


def strict(value):
    """What the page must hold of a value: no NaN, no infinity, no integer that a double cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int) and abs(value) > 2**53:
        return str(value)
    if isinstance(value, dict):
        return {key: strict(inner) for key, inner in value.items()}
    return [strict(inner) for inner in value] if isinstance(value, list) else value


def same(one, two):
    """Equal in type too: True is not 1 (1.0 and 1 are one number in JavaScript)."""
    return json.dumps(one, sort_keys=True) == json.dumps(two, sort_keys=True)


ANY_TEXT = st.text(st.characters() | st.sampled_from("</>&\"'\u2028\u2029\ud800\udfff\u202e\x00\ufeff"), max_size=40)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=5,
)
ROW = st.dictionaries(st.sampled_from(["instruction", "response", "status", "id", "turns", "__proto__"]), VALUE)


@given(st.lists(st.tuples(ROW, st.none() | st.floats()), max_size=8), st.lists(ANY_TEXT, min_size=2, max_size=2))
def test_rows_come_back_value_for_value(tmp_path_factory, pairs, names):
    rows = [{names[0]: names[1], **row, "ifd_ppl": score} for row, score in pairs]
    path = write_page(rows, tmp_path_factory.getbasetemp() / "round.html", title=names[0])
    back, head = decoded(path)
    assert same(back, strict(rows))
    assert same(head["title"], names[0])


@given(ANY_TEXT, ANY_TEXT)
def test_a_record_stands_in_the_page_as_base64_alone_and_the_title_escaped(tmp_path_factory, title, words):
    """Without its data blocks the page is that of plain texts, but for the title."""
    path = tmp_path_factory.getbasetemp() / "tags.html"

    def frame(title, words):
        rows = [{"instruction": words, "ifd_ppl": 0.5, words: words}]
        page = write_page(rows, path, title=title, summary={words: words}).read_bytes().decode("utf-8")
        return re.sub(r"\n+", "\n", BLOCK.sub("", page))

    title = f"</title><script>{title}"
    shown = escape(title).encode("utf-8", "xmlcharrefreplace").decode()
    plainly = frame("A plain title", "words").replace("A plain title", shown)
    assert frame(title, f"</script><script>{words}<!--") == re.sub(r"\n+", "\n", plainly)


def test_the_policy_names_our_script_and_style_by_hash_and_allows_nothing_else(tmp_path):
    page = write_page([{"ifd_ppl": 1.0}], tmp_path / "page.html", title="T").read_text()
    policy = re.search(r'Policy" content="([^"]*)"', page)[1]
    style, script = (
        re.search(r"<style>(.*?)</style>", page, re.S)[1],
        re.search(r"<script>(.*)</script>", page, re.S)[1],
    )
    digests = [b64encode(sha256(text.encode()).digest()).decode() for text in (style, script)]
    assert policy == f"default-src 'none'; style-src 'sha256-{digests[0]}'; script-src 'sha256-{digests[1]}'"
    assert not re.search(
        r"(?:src|href)=|url\(|@import|https?://(?!www\.w3\.org/2000/svg)|innerHTML|\beval\b", style + script
    )


def test_kinds_are_told_from_values(tmp_path):
    rows = [
        {"id": f"a-{n}", "status": "ok" if n else "failed", "ifd_ppl": n / 2, "n_cond": n, "selected": n > 3,
         "task": "ab"[n % 2], "instruction": "x" * 200, "reason": f"{n}\nlines", "scores": [0.5, n],
         "big": 2**60 + n, "never": None}
        for n in range(6)
    ]  # fmt: skip
    head = decoded(write_page(rows, tmp_path / "page.html", title="T"))[1]
    assert {column["name"]: column["kind"] for column in head["columns"]} == {
        "id": "label", "status": "category", "ifd_ppl": "number", "n_cond": "number", "selected": "category",
        "task": "category", "instruction": "text", "reason": "text", "scores": "text", "big": "label",
        "never": "category",
    }  # fmt: skip
    texts = {column["name"]: column for column in head["columns"] if column["kind"] == "text"}
    assert texts["instruction"]["preview"] == ["x" * columns.PREVIEW + "…"] * 6
    assert texts["instruction"]["length"] == [200] * 6
    assert "preview" not in texts["reason"]


def test_unscored_rows_are_none_whatever_marks_them(tmp_path):
    given = [None, float("nan"), float("inf"), -float("inf"), np.float32("nan"), np.float64(0.25), np.int64(2), 0]
    rows, _ = decoded(write_page([{"ifd_ppl": score} for score in given], tmp_path / "page.html", title="T"))
    assert [row["ifd_ppl"] for row in rows] == [None, None, None, None, None, 0.25, 2, 0]
    assert [type(row["ifd_ppl"]) for row in rows[-2:]] == [int, int]


def test_columns_are_kept_by_name_and_in_order_and_missing_keys_stay_missing(tmp_path):
    rows = [
        {"b": 1, "ifd_ppl": 0.5},
        {"a": 2, "ifd_ppl": None, "instruction": "do", "z": 3},
        {"ifd_ppl": 1.5, "a": None},
    ]
    path = tmp_path / "page.html"
    assert decoded(write_page(iter(rows), path, title="T"))[0] == rows
    back, head = decoded(write_page(rows, path, title="T", columns=["z", "a"]))
    assert [column["name"] for column in head["columns"]] == ["ifd_ppl", "instruction", "z", "a"]
    assert back == [{k: v for k, v in row.items() if k != "b"} for row in rows]


def test_texts_are_cut_into_blocks_and_the_page_is_the_same_every_time(tmp_path):
    rows = [{"instruction": f"number {n}", "ifd_ppl": n} for n in range(2 * columns.BLOCK + 1)]
    first = write_page(rows, tmp_path / "one.html", title="T")
    parts = unpacked(first)
    lengths = [len(parts[f"text-0-{block}"]) for block in range(3)]
    assert lengths == [columns.BLOCK, columns.BLOCK, 1]
    assert first.read_bytes() == write_page(rows, tmp_path / "two.html", title="T").read_bytes()


@pytest.mark.parametrize(
    ("value", "kept", "words"),
    [
        (np.arange(3), [0, 1, 2], "0 1 2"),
        (date(2024, 5, 1), "2024-05-01", "2024-05-01"),
        (b"caf\xc3\xa9 \xff", "café \ufffd", "café \ufffd"),
        ((True, {1: np.float32(0.5)}), [True, {"1": 0.5}], "true 0.5"),
        ([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], ..., "Hi Hello"),
        ([{"role": "user", "content": "Hi"}], ..., "Hi"),
        ([["question", "answer"], ["more", None]], ..., "question answer more"),
    ],
)
def test_plain_values_and_their_words(value, kept, words):
    assert same(plain(value), value if kept is ... else kept)
    assert flat(plain(value)) == words


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["before", "after"], [("before", "after")]),
        (["after_response", "before_response", "x"], [("before_response", "after_response")]),
        (["answer_before", "answer_after", "before"], [("answer_before", "answer_after")]),
        (["beforehand", "afterhand", "foreafter"], []),
    ],
)
def test_pairs_of_before_and_after(names, found):
    assert columns.pairs(names) == found


def test_short_texts_before_and_after_a_change_are_texts(tmp_path):
    rows = [{"before": "a", "after": "b"}] * 10
    head = decoded(write_page(rows, tmp_path / "page.html", title="T", score=None))[1]
    assert [column["kind"] for column in head["columns"]] == ["text", "text"]
    assert head["pairs"] == [["before", "after"]]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"a": 1}], {}, r"no row has the score 'ifd_ppl'; the columns are a; "),
        ([{"s": "high"}], {"score": "s"}, r"the score 's' holds 'high'; give a column of numbers"),
        ([{"s": True}], {"score": "s"}, r"the score 's' holds True"),
        ([{"s": 1}, ["x"]], {"score": "s"}, r"row 1 is a list; each row must be a mapping"),
        ([{1: 1}], {"score": None}, r"row 0 has the key 1; the names of columns must be strings"),
        ([{"s": 1}], {"score": "s", "columns": ["t"]}, r"no row has the column 't'"),
        ([{"s": 1}], {"score": "s", "text": "response"}, r"each must be a list of names"),
    ],
)
def test_wrong_requests_leave_the_old_page(tmp_path, rows, options, message):
    path = tmp_path / "page.html"
    path.write_text("old")
    with pytest.raises(RequestError, match=message):
        write_page(rows, path, title="T", **options)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_page_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "MOST_ROWS", 3)
    write_page(({"s": n} for n in range(3)), tmp_path / "page.html", title="T", score="s")
    with pytest.raises(RequestError, match=r"more than 3 rows; .* give a selection or a sample"):
        write_page(({"s": n} for n in range(4)), tmp_path / "page.html", title="T", score="s")
