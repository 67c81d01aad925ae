"""The benchmark compares what it says: the same replies and the same losses, by the published way and by ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import Command
from reflection_tuning import bench
from reflection_tuning.cli import app
from teachers import lines, some_records

from instruct_data import read

COMMAND = Command(app)


@pytest.mark.filterwarnings("ignore:max_length .* is lowered")
def test_both_ways_are_measured(room: Path, student: Path) -> None:
    data = lines("in.jsonl", some_records(4))
    found = COMMAND.said(
        "bench", "--data", data, "--student", student, "--records", 4, "--rounds", 1, "--latency", 0.02, "--replies",
        160, "--max-length", 512, "-o", "bench.json",
    )  # fmt: skip
    assert json.loads(Path("bench.json").read_text()) == found
    ((replies,), (scoring,)) = found["reflection"], found["scoring"]
    # a batch of ten waits for its slowest: less than 10 / 0.02 a second, and about 10 / 0.11
    assert replies["batches of ten, replies a second"] < 250
    assert replies["times as fast"] == pytest.approx(
        replies["replies a second"] / replies["batches of ten, replies a second"]
    )
    assert replies["times as fast"] > 2
    assert replies["times as fast, start and end included"] > 2
    assert replies["of what is possible"] == pytest.approx(replies["replies a second"] * 0.02 * 1.45 / 64)
    assert scoring["records"] == 4
    assert scoring["tokens"] < 0.8 * scoring["tokens, published way"]
    assert scoring["tokens spared"] == pytest.approx(1 - scoring["tokens"] / scoring["tokens, published way"])


def test_the_published_way_forwards_sixteen_texts_a_record(student: Path) -> None:
    from model_hooks import load

    model, tokenizer = load(student, dtype="float32")
    lengths: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    rows = bench.with_versions(read(some_records(2), name="r"))
    assert bench.passes(model, tokenizer, rows, "vicuna", 512) == sum(lengths)
    assert len(lengths) == 32
