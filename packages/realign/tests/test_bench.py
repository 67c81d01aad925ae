"""The benchmark measures what it says, with few records; acceptance runs take the defaults (see the README)."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from commands import Command
from realign import bench
from realign.cli import app

from instruct_data import Journal

COMMAND = Command(app)


@pytest.mark.slow
def test_a_server_of_a_known_latency_and_a_few_records(room: Path) -> None:
    found = COMMAND.said(
        "bench", "--latency", "0.05", "--in-flight", "4", "--rounds", "2", "--records", "20,40", "-o", "bench.json"
    )
    assert json.loads(Path("bench.json").read_text()) == found
    assert 0 < found["one by one, replies a second"] <= 20
    (row,) = found["speed"]
    assert row["in flight"] == 4
    assert 0 < row["of what is possible"] <= 1
    assert row["times one by one"] == pytest.approx(row["replies a second"] / found["one by one, replies a second"])
    assert 0 < row["journal, share of CPU"] < 1
    assert 0 < row["a core allows, of what is possible"] <= 1
    assert 0 <= row["waited for a core, share of the time"] < 1
    first, second = found["memory"]
    assert (first["records"], second["records"], first["times the first"]) == (20, 40, 1)
    assert second["times the first"] == pytest.approx(second["peak MB"] / first["peak MB"])
    COMMAND.refused("in-flight '0': give numbers above 0", "bench", "--in-flight", "0")
    COMMAND.refused("records '1k': give numbers above 0", "bench", "--records", "1k")


def test_the_journal_takes_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured is the journal: a slower one takes so much longer."""
    monkeypatch.setattr(bench, "ENTRIES", 50)
    fast, append = bench.journal_cost(), Journal.append

    def busy(self: Journal, key: str, value: Any) -> None:
        end = time.thread_time() + 0.004
        while time.thread_time() < end:
            pass
        append(self, key, value)

    monkeypatch.setattr(Journal, "append", busy)
    assert bench.journal_cost() - fast > 3.5


def test_the_pipeline_that_is_measured_rewrites_every_record(tmp_path: Path) -> None:
    assert bench.pipeline(30, tmp_path)["records"] == 30
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {row["realign_status"] for row in rows} == {"rewrite"}
    assert len(rows) == 30
