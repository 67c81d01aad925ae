"""The journal: what was appended is there, torn appends are not, and other settings are refused by name."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instruct_data.journal import Journal, canonical, content_key
from instruct_data.journal_index import RECENT, Index
from model_hooks import FingerprintMismatch, RequestError

SETTINGS = {"model": "abc", "dtype": "float32"}
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def key(value: Any) -> str:
    return content_key(value)


def contents(folder: Path) -> dict[int, Any]:
    with Journal(folder, SETTINGS, writer=None) as journal:
        return {i: journal.get(key(i)) for i in range(100) if key(i) in journal}


@settings(max_examples=25)
@given(appends=st.lists(st.dictionaries(st.integers(0, 30), json_values, max_size=5), max_size=6))
def test_what_is_appended_is_found_at_once_and_after_opening_again(
    tmp_path_factory: pytest.TempPathFactory, appends: list[dict[int, Any]]
) -> None:
    folder, first = tmp_path_factory.mktemp("journal"), {}
    with Journal(folder, SETTINGS) as journal:
        for entries in appends:
            first |= {i: v for i, v in entries.items() if i not in first}
            journal.extend((key(i), value) for i, value in entries.items())
        assert {i: journal.get(key(i)) for i in first} == first
        assert len(journal) == len(first)
        assert journal.get(key("never"), "absent") == "absent"
    assert contents(folder) == first


def test_lines_are_json_for_any_reader(tmp_path: Path) -> None:
    with Journal(tmp_path, SETTINGS, writer="w") as journal:
        journal.extend([(key(0), {"text": "é\n"}), (key(1), None)])
    lines = [json.loads(line) for line in (tmp_path / "w.jsonl").read_text().splitlines()]
    assert [(line["key"], line["more"], line["value"]) for line in lines] == [
        (key(0), 1, {"text": "é\n"}), (key(1), 0, None),
    ]  # fmt: skip


def test_a_tail_torn_at_any_byte_loses_its_own_append_and_no_other(tmp_path: Path) -> None:
    with Journal(tmp_path, SETTINGS) as journal:
        journal.append(key(0), "zero")
        begin = (tmp_path / "0.jsonl").stat().st_size
        journal.extend([(key(1), "one"), (key(2), "two"), (key(3), "three")])
    whole = (tmp_path / "0.jsonl").read_bytes()
    for cut in range(begin, len(whole)):
        (tmp_path / "0.jsonl").write_bytes(whole[:cut])
        assert contents(tmp_path) == {0: "zero"}
        with Journal(tmp_path, SETTINGS) as journal:
            journal.append(key(4), "four")
        assert contents(tmp_path) == {0: "zero", 4: "four"}
    (tmp_path / "0.jsonl").write_bytes(whole)
    assert contents(tmp_path) == {0: "zero", 1: "one", 2: "two", 3: "three"}


def test_damage_inside_loses_what_it_hit(tmp_path: Path) -> None:
    with Journal(tmp_path, SETTINGS) as journal:
        for i in range(5):
            journal.append(key(i), i)
    data = bytearray((tmp_path / "0.jsonl").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "0.jsonl").write_bytes(bytes(data))
    assert contents(tmp_path) == {0: 0, 1: 1, 3: 3, 4: 4}


def test_other_settings_are_refused_naming_each_that_differs(tmp_path: Path) -> None:
    Journal(tmp_path, {"model": "abc", "dtype": "float32", "compat": "original"}).close()
    with pytest.raises(FingerprintMismatch) as refused:
        Journal(tmp_path, {"model": "abc", "dtype": "bfloat16", "template": "chat", "compat": "original"})
    said = str(refused.value)
    assert "dtype: 'float32' there, 'bfloat16' now" in said
    assert "template: None there, 'chat' now" in said
    assert "model" not in said
    assert "compat" not in said
    Journal(tmp_path, {"compat": "original", "dtype": "float32", "model": "abc"}).close()  # order means nothing


def test_a_manifest_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(RequestError, match=r"manifest\.json is not JSON"):
        Journal(tmp_path, SETTINGS)


def test_writers_see_each_other_and_one_segment_has_one_writer(tmp_path: Path) -> None:
    with Journal(tmp_path, SETTINGS, writer="rank-0") as first:
        first.append(key(0), "a")
        with Journal(tmp_path, SETTINGS, writer="rank-1") as second:
            assert second.get(key(0)) == "a"
            second.append(key(1), "b")
        with pytest.raises(RequestError, match="written by another process"):
            Journal(tmp_path, SETTINGS, writer="rank-0")
    assert contents(tmp_path) == {0: "a", 1: "b"}
    with Journal(tmp_path, SETTINGS, writer=None) as reader, pytest.raises(RequestError, match="reading only"):
        reader.append(key(2), "c")


def test_a_full_disk_names_the_file_and_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[[int, bytes], int] = os.write
    room = [40]

    def write(descriptor: int, data: bytes) -> int:
        if room[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = real(descriptor, bytes(data[: room[0]]))
        room[0] -= written
        return written

    with Journal(tmp_path, SETTINGS) as journal:
        journal.append(key(0), "before")
        with monkeypatch.context() as patched:
            patched.setattr(os, "write", write)
            with pytest.raises(OSError, match=r"No space left on device: .*0\.jsonl"):
                journal.append(key(1), "lost")
        journal.append(key(2), "after")
        assert key(1) not in journal
    assert contents(tmp_path) == {0: "before", 2: "after"}


@pytest.mark.parametrize("value", [math.nan, math.inf, {"a": [-math.inf]}])
def test_values_are_strict_json(tmp_path: Path, value: Any) -> None:
    with Journal(tmp_path, SETTINGS) as journal:
        with pytest.raises(ValueError):
            journal.append(key(0), value)
        with pytest.raises(ValueError, match="64 hex digits"):
            journal.append("short", 1)
    assert contents(tmp_path) == {}


def test_threads_append_whole_lines(tmp_path: Path) -> None:
    with Journal(tmp_path, SETTINGS) as journal:
        threads = [
            Thread(target=lambda n: [journal.append(key(i), "x" * 3000) for i in range(n, 100, 4)], args=(n,))
            for n in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert journal.get(key(50)) == "x" * 3000
    assert len(contents(tmp_path)) == 100


@pytest.mark.parametrize(("seconds", "at_least", "at_most"), [(0.0, 20, 20), (60.0, 0, 2)])
def test_appends_are_synced_each_or_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, at_least: int, at_most: int
) -> None:
    calls: list[int] = []
    real = os.fsync
    with Journal(tmp_path, SETTINGS, sync_seconds=seconds) as journal:
        monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append(descriptor) or real(descriptor))
        for i in range(20):
            journal.append(key(i), i)
        assert at_least <= len(calls) <= at_most
        before = len(calls)
    assert len(calls) > before  # leaving the block syncs at once, whatever the interval


@pytest.mark.slow
def test_everything_returned_from_append_survives_kill(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from instruct_data.journal import Journal, content_key\n"
        f"journal = Journal(sys.argv[1], {SETTINGS!r})\n"
        "for i in range(50):\n"
        "    journal.append(content_key(i), i)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -9
    assert contents(tmp_path) == {i: i for i in range(50)}


def test_canonical_json_does_not_depend_on_order() -> None:
    assert content_key({"b": 1, "a": [1.5, "é"]}) == content_key({"a": [1.5, "é"], "b": 1})
    assert canonical({"b": 1, "a": None}) == '{"a":null,"b":1}'
    assert content_key(1) != content_key("1")


@given(
    entries=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 1000)), max_size=80),
    settle=st.sets(st.integers(0, 80)),
)
def test_the_index_is_a_dictionary(entries: list[tuple[int, int]], settle: set[int]) -> None:
    """Also where the first 64 bits of keys are equal."""
    index, expected = Index(), {}
    for step, (number, offset) in enumerate(entries):
        name = f"{number % 3:016x}{number:016x}" + 32 * "0"
        if expected.setdefault(name, (number, offset)) == (number, offset):
            index.add(name, number, offset)
        if step in settle:
            index.settle()
    index.settle()
    assert {name: index.find(name) for name in expected} == expected
    assert len(index) == len(expected)
    assert index.find("f" * 64) is None


def test_an_entry_of_the_index_costs_24_bytes() -> None:
    count = 16 * RECENT
    index = Index()
    tracemalloc.start()
    for i in range(count):
        index.add(f"{i * 2654435761 % 2**64:016x}{i:016x}" + 32 * "0", 0, i)
    index.settle()
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 26 * count
