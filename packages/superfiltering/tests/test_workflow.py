"""What stands between the files and the functions: rows of the page, numbers asked for, the way into a script."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from superfiltering import superfilter
from superfiltering.scores import RecordScores, read_scores, score_records
from superfiltering.selection import select
from superfiltering.workflow import (
    compare_scores,
    describe,
    diversify_records,
    labels_of,
    number_of,
    rows_of,
    run_all,
    text_of,
    texts_of,
    write_chosen,
)  # fmt: skip

from instruct_data.records import read
from instruct_data.scoring.losses import Losses
from model_hooks import RequestError, load

pytestmark = pytest.mark.filterwarnings("ignore:max_length 1024 is lowered")


def some_scores(values: list[float]) -> RecordScores:
    found, none = np.array(values), np.full(len(values), np.nan)
    statuses = ["ok" if math.isfinite(v) else "failed" for v in values]
    return RecordScores([str(k) for k in range(len(values))], found, none, np.arange(len(values)), statuses)


def test_rows_of_the_page(alpaca: Any, talks: Any) -> None:
    rows = list(rows_of(read(alpaca(3)), some_scores([0.5, math.nan, 2.0]), [2]))
    assert [row["selected"] for row in rows] == [False, False, True]
    assert [row["ifd_ppl"] for row in rows] == [0.5, None, 2.0]
    assert [(row["id"], row["status"], row["tokens"]) for row in rows] == [
        ("0", "ok", 0),
        ("1", "failed", 1),
        ("2", "ok", 2),
    ]
    assert [row["response"] for row in rows] == [r["output"] for r in alpaca(3)]
    one, two, _ = rows_of(read(talks(3)), some_scores([1, 1, 1]))
    assert "selected" not in one
    assert "conversation" not in one
    assert [t["content"] for t in two["conversation"]] == [t["value"] for t in talks(3)[1]["conversations"]]
    assert (two["instruction"], two["response"]) == (
        two["conversation"][0]["content"],
        two["conversation"][-1]["content"],
    )


@given(st.integers(1, 10**6), st.integers(1, 1000))
def test_shares_are_rounded_down(records: int, tenths: int) -> None:
    wanted = math.floor(Fraction(tenths, 1000) * records)
    top = f"{tenths // 10}.{tenths % 10}%"
    if wanted:
        assert number_of(records, top, 0) == wanted
    else:
        with pytest.raises(RequestError, match="less than one"):
            number_of(records, top, 0)


@given(st.lists(st.floats(0, 2), min_size=1, max_size=30), st.data())
def test_chosen_records_are_written_as_they_were_read(tmp_path_factory: Any, values: list[float], data: Any) -> None:
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    rows = [
        {
            "instruction": data.draw(text),
            "output": data.draw(text),
            "extra": data.draw(st.sampled_from([None, [1], 0.1])),
        }
        for _ in values
    ]
    chosen, output = select(values, top_n=len(values)).chosen, tmp_path_factory.getbasetemp() / "chosen.jsonl"
    write_chosen(read(rows), chosen, output, some_scores(values), overwrite=True)
    written = [json.loads(line) for line in output.read_bytes().splitlines()]
    assert written == [{**rows[k], "ifd_ppl": values[k], "ifd_loss": None} for k in chosen]


def test_texts_and_labels(talks: Any) -> None:
    rows = [{"instruction": "i", "output": "o"}, {"instruction": "j", "input": "k", "output": "p", "kind": 3}]
    assert list(texts_of(read(rows), "whole")) == ["i\n\no", "j\nk\np"]
    assert list(texts_of(read(rows), "response")) == ["o", "p"]
    turns = [t["value"] for t in talks(3)[2]["conversations"]]
    assert list(texts_of(read(talks(3)), "response"))[2] == "\n".join(turns[1::2])
    assert labels_of(read(rows[1:]), "kind") == ["3"]
    with pytest.raises(RequestError, match="record 0 has no 'kind' to group by"):
        labels_of(read(rows), "kind")


def test_quotas_of_a_diverse_choice(alpaca: Any, tmp_path: Path) -> None:
    records, points = read(alpaca(20)), np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    options = {"number": 6, "embeddings": points, "group_by": "topic"}
    found = diversify_records(records, tmp_path / "out.jsonl", **options)  # type: ignore[arg-type]
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sorted(row["topic"] for row in written) == list("aaabbb")
    assert found["chosen"] == 6
    assert found["first_gain"] >= found["gain_at_half"]


def test_scores_are_compared_by_id(tmp_path: Path, weak: Path, strong: Path, alpaca: Any) -> None:
    """Another order and a record more on one side change nothing."""
    rows = [{"id": f"r{n}", **row} for n, row in enumerate(alpaca(25))]
    for name, folder, some in (
        ("a", weak, rows),
        ("b", strong, rows),
        ("c", strong, [*rows[::-1], {**rows[0], "id": "x"}]),
    ):
        score_records(*load(folder, dtype="float32"), read(some), tmp_path / f"{name}.parquet", budget=1)
    left, *others = (tmp_path / f"{name}.parquet" for name in "abc")
    same, more = (compare_scores(left, other, by="ifd_ppl", turns="mean", resamples=0) for other in others)
    assert same["spearman"] == pytest.approx(more["spearman"], abs=1e-12)
    assert (more["records"], more["only_second"]) == (25, 1)
    assert sum(row["records"] for row in more["by_length"]) == 25


def test_reports_hold_no_nan(alpaca: Any) -> None:
    told = describe(some_scores([0.5, math.nan, 2.0]))
    assert json.loads(json.dumps(told, allow_nan=False))["scored"] == 2
    assert told["statuses"] == {"ok": 2, "failed": 1}


def test_a_forced_schema_holds_for_what_is_written_too(weak: Path, alpaca: Any, tmp_path: Path) -> None:
    """The records fit two schemas, so that they cannot be read again without its name."""
    rows = [{**row, "messages": [{"role": "user", "content": "x"}]} for row in alpaca(20)]
    with pytest.raises(RequestError, match="more than one schema"):
        read(rows)
    said = run_all(
        read(rows, "alpaca"), str(weak), tmp_path / "out", top="40%", diverse="10%", encoder=str(weak), template="none",
        compat="original", max_length=64, dtype="auto", overwrite=False,
    )  # fmt: skip
    assert said["diverse"] == 2


def test_a_dataset_of_a_script(weak: Path, alpaca: Any, tmp_path: Path) -> None:
    from datasets import Dataset

    model, tokenizer = load(weak, dtype="float32")
    dataset = Dataset.from_list(alpaca(30))
    found = superfilter(dataset, model, tokenizer, top="10%", maximum=10.0)
    score_records(model, tokenizer, read(alpaca(30)), tmp_path / "scores.parquet")
    wanted = np.argsort(-read_scores(tmp_path / "scores.parquet").ifd_ppl, kind="stable")[:3]
    assert found.chosen.tolist() == wanted.tolist()
    assert dataset.select(found.chosen)["topic"] == [alpaca(30)[k]["topic"] for k in wanted]


def test_a_batch_that_does_not_fit_is_halved_to_the_same_scores(
    weak: Path, alpaca: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    model, tokenizer = load(weak, dtype="float32")
    files = [tmp_path / "roomy.parquet", tmp_path / "tight.parquet"]
    monkeypatch.setattr(Losses, "check", lambda self, segments: None)
    score_records(model, tokenizer, read(alpaca(40)), files[0], budget=256)
    real, sizes, refused = model.base_model.forward, [], []

    def tight(*args: Any, **kwargs: Any) -> Any:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids.numel() > 60:
            refused.append(ids.numel())
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(ids.numel())
        return real(*args, **kwargs)

    monkeypatch.setattr(model.base_model, "forward", tight)
    facts = score_records(model, tokenizer, read(alpaca(40)), files[1], budget=256)
    roomy, small = map(read_scores, files)
    assert refused
    assert max(sizes) <= 60
    assert facts["failed"] == 0
    np.testing.assert_allclose(small.ifd_ppl, roomy.ifd_ppl, rtol=1e-5)
    assert select(small.ifd_ppl, top=0.1).chosen.tolist() == select(roomy.ifd_ppl, top=0.1).chosen.tolist()


def test_what_is_embedded_of_a_record() -> None:
    assert text_of("do", "", "done") == "do\n\ndone"
    assert text_of("do", "it", "done", "instruction") == "do"
    assert text_of("do", "it", "done", "response") == "done"
    with pytest.raises(RequestError, match="whole, instruction, response"):
        text_of("do", "it", "done", "input")
