"""Files of scores: what is in them, whose they are, and the original's."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from superfiltering.scores import (
    SCHEMA,
    check_same,
    content_of,
    read_scores,
    score_records,
    scores_within,
    work_folder,
    write_original,
)
from superfiltering.selection import original_selection, select
from superfiltering.workflow import positions_of, scores_for, select_records

from instruct_data.records import read
from instruct_data.templates import template
from model_hooks import FingerprintMismatch, RequestError, load

pytestmark = pytest.mark.filterwarnings("ignore:max_length 1024 is lowered")


@pytest.fixture(scope="module")
def loaded(weak: Path) -> tuple[Any, Any]:
    return load(weak, dtype="float32")


@torch.no_grad()
def mean_loss(model: Any, ids: list[int], first: int) -> float:
    """Float64 mean of -log p(token) over the tokens from `first` (at least the second) on; NaN over none."""
    logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    losses = [-float(logits[t - 1, ids[t]]) for t in range(max(1, first), len(ids))]
    return sum(losses) / len(losses) if losses else math.nan


def by_hand(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    whole, before = tokenizer.encode(prompt + answer), tokenizer.encode(prompt)
    return math.exp(mean_loss(model, whole, len(before)) - mean_loss(model, tokenizer.encode(answer), 1))


def test_scores_are_those_computed_by_hand(loaded: Any, alpaca: Any, tmp_path: Path) -> None:
    records, file = read(alpaca(9)), tmp_path / "scores.parquet"
    facts = score_records(*loaded, records, file, name="tiny")
    found = read_scores(file)
    for record, value in zip(records, found.ifd_ppl):
        example = record.examples[0]
        assert value == pytest.approx(by_hand(*loaded, template("none")(example), example.response), rel=1e-4)
    assert found.ids == [str(i) for i in range(9)]
    assert found.facts == facts
    assert (facts["model_name"], facts["settings"]["template"], facts["rejected"]) == ("tiny", "none", 0)
    assert found.columns["ppl_A_condition"] / found.columns["ppl_A_direct"] == pytest.approx(found.ifd_ppl)
    assert pq.read_schema(file).names == SCHEMA.names
    assert not work_folder(file).exists()


@pytest.mark.parametrize("key", ["conversations", "messages"])
def test_every_turn_is_scored_after_its_own_history(key: str, loaded: Any, talks: Any, tmp_path: Path) -> None:
    records, file = read(talks(6, key)), tmp_path / "scores.parquet"
    score_records(*loaded, records, file)
    prompt = template("none")
    turns = [[by_hand(*loaded, prompt(e), e.response) for e in record.examples] for record in records]
    for how, combine in (("mean", np.mean), ("min", min), ("last", lambda t: t[-1])):
        assert read_scores(file, how).ifd_ppl == pytest.approx([combine(t) for t in turns], rel=1e-4)  # type: ignore[arg-type]
    found = read_scores(file)
    assert found.ids == [f"talk-{n}" for n in range(6)]
    assert [math.isnan(v) for v in found.columns["ppl_A_condition"]] == [len(t) > 1 for t in turns]
    assert pq.read_table(file)["turn"].to_pylist() == [n for t in turns for n in range(len(t))]


def test_what_cannot_be_scored_has_no_score_and_a_reason(loaded: Any, tmp_path: Path) -> None:
    rows = [
        {"instruction": "a", "output": ""}, {"instruction": "a", "output": "x"},
        {"instruction": "word " * 200, "output": "b c"}, {"instruction": "a", "output": "the value of self"},
    ]  # fmt: skip
    file, records = tmp_path / "scores.parquet", read(rows)
    with pytest.warns(UserWarning, match="lowered to 128"):
        score_records(*loaded, records, file)
    found = read_scores(file)
    assert found.statuses == ["empty_response", "one_token", "prompt_too_long", "ok"]
    assert np.isnan(found.ifd_ppl).tolist() == [True, True, True, False]
    assert found.side_columns(0)["ifd_ppl"] is None
    assert select(found.ifd_ppl, top_n=4, maximum=None).chosen.tolist() == [3]


def test_scores_of_other_data_are_refused_by_the_record(loaded: Any, alpaca: Any, tmp_path: Path) -> None:
    rows, file = alpaca(6), tmp_path / "scores.parquet"
    score_records(*loaded, read(rows, name="data"), file)
    scores = read_scores(file)
    check_same(read(rows), scores, file)
    check_same(read([{**row, "topic": "other", "score": 3} for row in rows]), scores, file)  # none of its texts
    changes: dict[str, tuple[list[dict[str, Any]], str]] = {
        "edited": ([*rows[:4], {**rows[4], "output": "changed"}, *rows[5:]], "the texts of record 4, id 4"),
        "renamed": ([*rows[:2], {**rows[2], "id": "x"}, *rows[3:]], "record 2 has id x, its score id 2"),
        "shorter": (rows[:5], r"6 scores, .* 5 records"),
        "longer": ([*rows, rows[0]], "record 6 has id 6, its score id none"),
        "shuffled": (rows[::-1], "record 0"),
    }
    for other, message in changes.values():
        with pytest.raises(FingerprintMismatch, match=message):
            scores_for(read(other), file, "ifd_ppl")


def test_the_second_process_that_finishes_writes_the_file(loaded: Any, alpaca: Any, tmp_path: Path) -> None:
    records, file, whole = read(alpaca(12)), tmp_path / "scores.parquet", tmp_path / "whole.parquet"
    score_records(*loaded, records, whole, budget=1)  # one by one: bit for bit the same
    assert score_records(*loaded, records, file, rank=1, world=2, budget=1) == {"pending": [0]}
    assert not file.exists()
    facts = score_records(*loaded, records, file, rank=0, world=2, budget=1)
    assert facts["world"] == 2
    assert not work_folder(file).exists()
    assert pq.read_table(file).equals(pq.read_table(whole))


def test_an_older_output_is_no_result_of_another_process(loaded: Any, alpaca: Any, tmp_path: Path) -> None:
    file = tmp_path / "scores.parquet"
    score_records(*loaded, read(alpaca(3)), file)  # to be overwritten
    for rank in (0, 1):
        facts = score_records(*loaded, read(alpaca(8)), file, rank=rank, world=2)
    assert facts["total"] == 8
    assert len(read_scores(file).ids) == 8


def test_a_share_that_another_process_has_written_is_done(
    loaded: Any, alpaca: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    from instruct_data import scoring

    file, real = tmp_path / "scores.parquet", scoring.score

    def overtaken(*args: Any, **kwargs: Any) -> Any:
        """The other process ends while this one is between its last record and the merge, and takes its share."""
        real(*args, **kwargs)
        shutil.rmtree(kwargs["folder"])

    monkeypatch.setattr(scoring, "score", overtaken)
    assert score_records(*loaded, read(alpaca(4)), file, rank=0, world=2) == {"pending": []}
    assert list(tmp_path.iterdir()) == []


VALUE = st.one_of(st.floats(0.01, 50), st.just(math.nan), st.just(0.0))


@given(st.lists(st.tuples(VALUE, VALUE, VALUE, VALUE), min_size=1, max_size=30), st.booleans())
def test_the_originals_lines(tmp_path_factory: Any, rows: Any, strict: bool) -> None:
    """Bare NaN or null; the original's ratio, and a failure (0) is no score."""
    path = tmp_path_factory.getbasetemp() / "original.jsonl"
    shown = [{"ppl": [0, r[0], 0, r[1]], "loss": [0, r[2], 0, r[3]]} for r in rows]
    text = "".join(json.dumps(line) + "\n" for line in shown)
    path.write_text(text.replace("NaN", "null") if strict else text)
    found = read_scores(path)
    for (direct, cond, *_), value, status in zip(rows, found.ifd_ppl, found.statuses):
        if direct == 0 or cond == 0:
            assert status == "failed"
            assert math.isnan(value)
        elif math.isnan(direct) or math.isnan(cond):
            assert math.isnan(value)
        else:
            assert value == cond / direct
    chosen = select(found.ifd_ppl, top_n=len(rows)).chosen
    assert all(rows[k][0] and rows[k][1] for k in chosen)


@pytest.mark.parametrize("line", [b"", b"{", b'{"ppl": [0, 1], "loss": []}', b"3", b'{"ppl": "xxxx"}', b"\xff\xfe{}"])
def test_a_torn_line_is_named(line: bytes, tmp_path: Path) -> None:
    good = b'{"ppl": [0, 1, 0, 1], "loss": [0, 1, 0, 1]}\n'
    (tmp_path / "bad.jsonl").write_bytes(good + line + b"\n")
    with pytest.raises(RequestError, match=r"bad\.jsonl:2: is no line of the original's scores"):
        read_scores(tmp_path / "bad.jsonl")


def test_original_lines_written_are_strict_and_read_back(loaded: Any, alpaca: Any, tmp_path: Path) -> None:
    rows = [*alpaca(6), {"instruction": "a", "output": ""}]
    score_records(*loaded, read(rows), tmp_path / "scores.parquet")
    assert write_original(tmp_path / "scores.parquet", tmp_path / "o.jsonl") == 7
    lines = (tmp_path / "o.jsonl").read_text().splitlines()
    assert "NaN" not in "".join(lines)
    assert json.loads(lines[6]) == {"ppl": [0, None, 0, None], "loss": [0, None, 0, None]}
    ours, theirs = read_scores(tmp_path / "scores.parquet"), read_scores(tmp_path / "o.jsonl")
    np.testing.assert_allclose(theirs.ifd_ppl, ours.ifd_ppl)
    np.testing.assert_allclose(theirs.ifd_loss, ours.ifd_loss)
    with pytest.raises(RequestError, match=r"7 lines, .* 6 records"):
        scores_for(read(alpaca(6)), tmp_path / "o.jsonl", "ifd_ppl")


SCORE = st.one_of(st.none(), st.integers(0, 12).map(lambda k: k / 8))


@given(st.lists(SCORE, min_size=10, max_size=60))
def test_records_with_scores_are_chosen_as_by_the_original_rule(tmp_path_factory: Any, values: list[Any]) -> None:
    """int(N * 0.1) of those below 1, falling, stable: and what is written is what was read, with its score."""
    rows = [{"instruction": f"i{n}", "output": f"o{n}", "ifd_ppl": v} for n, v in enumerate(values)]
    records, output = read(rows), tmp_path_factory.getbasetemp() / "chosen.jsonl"
    said = select_records(records, scores_within(records), output, bare=True, overwrite=True, top="10%")
    usable = [(n, v) for n, v in enumerate(values) if v is not None and v < 1]
    wanted = [n for n, _ in sorted(usable, key=lambda pair: -pair[1])][: int(len(values) * 0.1)]
    assert wanted == original_selection(values).tolist()
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert written == [rows[n] for n in wanted]
    assert said["chosen"] == len(wanted)
    if wanted:
        assert positions_of(records, read(str(output))) == wanted


def test_scores_within_records_must_be_numbers() -> None:
    rows = [{"instruction": "a", "output": "b", "ifd_ppl": True}]
    with pytest.raises(RequestError, match="'ifd_ppl' is True, must be a number or null"):
        scores_within(read(rows))
    with pytest.raises(RequestError, match="has 'ifd_loss'; score them first"):
        scores_within(read(rows), "ifd_loss")
    found = scores_within(read([{**rows[0], "ifd_loss": 0.5}]), "ifd_loss")
    assert (found.ifd_loss.tolist(), found.statuses) == ([0.5], ["ok"])
    assert math.isnan(found.ifd_ppl[0])


def test_records_are_found_by_their_texts(alpaca: Any) -> None:
    """Records without an id: their place in the second file says nothing."""
    rows = alpaca(5)
    rows.append(dict(rows[1]))
    records = read(rows)
    assert positions_of(records, read([rows[3], rows[1], rows[0]])) == [3, 1, 0]
    assert positions_of(records, read([rows[1], rows[5]])) == [1, 5]
    for others in ([{**rows[0], "output": "new"}], [rows[0]] * 2, [{**rows[0], "id": 0}]):
        with pytest.raises(RequestError, match=f"record {len(others) - 1} of others is not in"):
            positions_of(records, read(others, name="others"))


def test_content_is_the_texts_alone(alpaca: Any) -> None:
    row = {"id": 3, "instruction": "a", "input": "b", "output": "c"}
    same = [row, {**row, "id": 4}, {**row, "note": 1}, dict(reversed(row.items()))]
    other = [{**row, "instruction": "ab", "input": ""}, {**row, "output": "d"}, {**row, "input": None}]
    contents = [content_of(next(iter(read([r])))) for r in (*same, *other)]
    assert len(set(contents[:4])) == 1
    assert len(set(contents)) == 4


def test_files_that_are_no_scores(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing")
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "other.parquet")
    for name, message in (
        ("none.parquet", "does not exist"), ("bad.parquet", "is no Parquet file of scores"),
        ("other.parquet", "no column 'record'"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=message):
            read_scores(tmp_path / name)
