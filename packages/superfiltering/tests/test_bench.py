"""The benchmark compares with the published procedure: same losses, no score by failure, a report that JSON holds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from processes import FORKED
from superfiltering import bench
from superfiltering.cli import app
from typer.testing import CliRunner

from instruct_data.records import read
from instruct_data.scoring import Pair, score
from instruct_data.templates import none
from model_hooks import load


def test_one_by_one_is_what_the_engine_computes(weak: Path, alpaca: Any) -> None:
    """Within 1e-5 on every record, and NaN in exactly the same places."""
    model, tokenizer = load(weak, dtype="float32")
    examples = [record.examples[0] for record in read(alpaca(60))]
    pairs = [Pair(str(n), none(e), e.response) for n, e in enumerate(examples)]
    full = next(text for n in range(96, 1, -1) if len(tokenizer.encode(text := " the value" * n)) == 96)
    pairs += [Pair("one token", "a\n", "x"), Pair("cut", "a\n", full), Pair("no room", full, " a list of items")]
    wanted = bench.one_by_one(model, tokenizer, pairs, max_length=96)
    found = score(model, tokenizer, pairs, max_length=96).table().to_pylist()
    for row, losses in zip(found, wanted):
        for side, loss in zip(("cond", "direct"), losses):
            if math.isnan(loss):
                assert row[f"loss_{side}_sum"] is None, row
            else:
                assert row[f"loss_{side}_sum"] / row[f"n_{side}"] == pytest.approx(loss, abs=1e-5)
    assert sum(math.isnan(value) for losses in wanted for value in losses) >= 2


@pytest.mark.parametrize("kind", bench.KINDS)
def test_pairs_are_as_many_and_as_long_as_asked(kind: str) -> None:
    pairs = bench.probe_pairs(30, kind)
    assert [pair.key for pair in pairs] == [str(n) for n in range(30)]
    assert pairs == bench.probe_pairs(30, kind)
    assert all(pair.response.strip() and pair.prompt.endswith("\n") for pair in pairs)
    assert len({pair[1:] for pair in bench.probe_pairs(2000, kind)}) > 1990  # few are scored once for two


def test_short_answers_are_beginnings_of_long_ones() -> None:
    short, long = (bench.probe_pairs(30, kind) for kind in bench.KINDS)
    assert all(b.response.startswith(a.response) for a, b in zip(short, long))
    assert sum(len(pair.response) for pair in short) < 0.7 * sum(len(pair.response) for pair in long)


@pytest.mark.slow
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its processes are forked: `spawn` would import torch three times."""
    monkeypatch.setattr(bench.multiprocessing, "get_context", lambda _: FORKED)
    file = tmp_path / "bench.json"
    words = ["bench", "--small", "--records", "4", "--scaling", "64", "--rounds", "1", "--json", "-o", str(file)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout, parse_constant=pytest.fail)
    assert json.loads(file.read_text()) == found
    assert found["two_ranks_times_faster"] is None or found["two_ranks_times_faster"] > 0
    assert {(row["answers"], row["dtype"]) for row in found["speed"]} >= {("short", "float32"), ("long", "float32")}
    for row in found["speed"]:
        assert row["times_faster"] > 0
        assert row["largest_difference"] < (1e-5 if row["dtype"] == "float32" else 5e-2)
