"""The tables: they read at every scale, records and parts are what they say, and the quick scale runs whole."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llm_server import Server
from reflection_tuning import tables
from reflection_tuning.generated import CLEAN, DAMAGE, damaged, inventories, right
from reflection_tuning.parsing import INSTRUCTION, RESPONSE, parse
from reflection_tuning.tables import CHAT, FIGURES, LEARN_FROM, PAPER, inventories_of, lessons_of, run
from reflection_tuning.train import TrainConfig, train
from teachers import lines, some_records

from instruct_data import read
from instruct_data.completions import completions
from model_hooks import RequestError, load
from paper_tables import Context
from paper_tables.errors import TableError
from paper_tables.launch import deepspeed_file
from paper_tables.training import config_of

CELL: dict[str, Any] = {
    "data": "generated", "records": 12, "teacher_records": 9, "heldout": 5, "damage": 0.5, "seed": 0, "row": "r",
    "figures": "student", "learn_from": "original", "policy": "v2-paper", "damage_kind": "all", "student": "zoo:gpt2",
    "table": "main", "epochs": 1,
}  # fmt: skip


def test_the_tables_read_and_name_what_is_known() -> None:
    found = PAPER.tables()
    assert set(found) == {"main", "selection"}
    for table in found.values():
        assert table.claims
        for scale in table.scales:
            for unit in table.units(scale):
                assert unit.cell["figures"] in FIGURES
                assert unit.cell.get("learn_from", "original") in LEARN_FROM
                assert unit.cell.get("damage_kind", "all") in ("all", CLEAN, *DAMAGE)
    assert {"quick", "tiny", "paper"} == set(found["main"].scales)
    with pytest.raises(TableError, match="unknown figures 'loss'"):
        run({**CELL, "figures": "loss"}, Context())
    with pytest.raises(TableError, match="did you mean 'v2-top'"):
        run({**CELL, "learn_from": "v2top"}, Context())


def test_the_papers_figures_are_those_of_the_published_table() -> None:
    figures = {(f.row, f.column): f.value for f in PAPER.tables()["main"].figures}
    names = ("alpaca_eval", "open_llm", "arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc2", "records")
    published = {
        "original": (26.46, 50.21, 42.65, 76.91, 41.73, 39.55, 52002),
        "v1": (76.99, 56.18, 53.92, 77.68, 47.55, 45.55, 52002),
        "v2": (79.58, 56.05, 54.01, 78.07, 46.69, 45.41, 37114),
    }
    assert figures == {(row, n): v for row, values in published.items() for n, v in zip(names, values)}
    for row, (_, average, *four) in ((row, values[:6]) for row, values in published.items()):
        assert sum(four) / 4 == pytest.approx(average, abs=0.01), row


@given(st.integers(6, 60), st.integers(0, 10**6), st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_generated_records_are_what_they_say(count: int, seed: int, share: float) -> None:
    clean = inventories(count, str(seed))
    assert len({(one.place, one.things) for one in clean}) == count
    made = damaged(clean, share, str(seed))
    each = int(count * share) // 3
    counts = Counter(one.damage for one in made)
    assert all(counts[kind] == each for kind in DAMAGE)
    for one, before in zip(made, clean):
        assert (one.place, one.things, one.asked) == (before.place, before.things, before.asked)
        assert right(one.new_answer, one.things)
        assert right(one.better_answer, one.things)
        named = [thing in one.instruction for thing in one.things]
        assert not any(named) if one.damage == "vague" else all(named)
        assert right(one.answer, one.things) == (one.damage in (CLEAN, "vague")) or one.damage == "swapped"
        for reply, names in ((f"[Better Answer]\n{one.better_answer}", RESPONSE),):
            assert parse(reply, names)["better_answer"] == one.better_answer


def test_nothing_held_out_is_learned_from() -> None:
    train_, held, others = (
        {(one.place, one.things) for one in part}
        for part in inventories_of({**CELL, "records": 60, "heldout": 40, "teacher_records": 60})
    )
    assert (len(train_), len(held), len(others)) == (60, 40, 60)
    assert not train_ & held
    assert not (train_ | held) & others


def test_the_teacher_sees_the_stage_and_the_pair_alone(tmp_path: Path) -> None:
    _, tokenizer = load("zoo:gpt2")
    tokenizer.chat_template = CHAT
    one = inventories_of(CELL)[2][0]
    lessons = lessons_of(one)
    assert len(lessons) == 3
    rows = completions(lessons, "messages", "chat", tokenizer)
    assert [row["prompt"].partition(" ")[0] for row in rows] == ["Both:", "Answer:", "Answer:"]
    assert rows[0]["prompt"] == f"Both: {one.instruction}\n{one.answer}\n"
    assert rows[2]["prompt"] == f"Answer: {one.new_instruction}\n{one.new_answer}\n"
    assert parse(rows[0]["completion"], INSTRUCTION)["new_answer"] == one.new_answer
    assert parse(rows[2]["completion"], RESPONSE)["better_answer"] == one.better_answer


def test_a_row_learns_from_what_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a teacher that is always right and scores that accept the first half of what it wrote."""
    from dataclasses import replace

    from reflection_tuning.versions import Version, columns, original

    train_, _, _ = inventories_of(CELL)
    rows = []
    for at, (record, one) in enumerate(zip(read(tables.rows_of(train_), name="r"), train_)):
        new = Version(instruction=one.new_instruction, answer=one.new_answer, score_status="ok", ifd=0.9, rifd=0.5)
        low = 0.4 if at < 6 else 0.6
        versions = {
            "ori": replace(original(record), score_status="ok", ifd=0.5, rifd=0.5), "Q": new,
            "A": Version(answer=one.better_answer, score_status="ok", ifd=0.5, rifd=0.4),
            "QA": replace(new, answer=one.better_answer, ifd=0.8 + at / 100, rifd=low),
        }  # fmt: skip
        rows.append({**record.data, **columns(versions)})
    monkeypatch.setattr(tables, "reflect_and_score", lambda cell, given: rows)
    learned: list[Any] = []
    monkeypatch.setattr(tables, "student", lambda cell, found: learned.append(found) or {"loss": 1.0})
    context = Context()
    found = {name: run({**CELL, "learn_from": name, "share": 0.5}, context) for name in LEARN_FROM}
    assert [found[name]["records"] for name in LEARN_FROM] == [12, 12, 6, 3]
    assert [found[name]["right"] for name in LEARN_FROM] == [50, 100, 100, 100]
    assert [row["id"] for row in learned[3]] == [3, 4, 5]
    told = run({**CELL, "figures": "selection"}, context)
    assert (told["instruction_accepted"], told["answer_accepted"], told["emitted"]) == (100, 50, 50)
    assert (told["right_before"], told["right_after"], told["reflected"]) == (50, 100, 100)
    alone = [{**row, "reflection": {"ori": row["reflection"]["ori"]}} for row in rows]
    monkeypatch.setattr(tables, "reflect_and_score", lambda cell, given: alone)
    assert run({**CELL, "learn_from": "v2", "seed": 1}, Context()) == {"records": 0}  # and no student of nothing


def test_training_settings(tmp_path: Path) -> None:
    config = TrainConfig(model="zoo:gpt2", data="x", output=tmp_path / "o")
    assert (config.template, config.epochs, config.learning_rate, config.max_length) == ("vicuna", 3, 2e-5, 2048)
    from reflection_tuning import train as module

    for name in ("zero2", "zero3", "zero3-offload"):
        assert deepspeed_file(module.__file__, name)
    with pytest.raises(RequestError, match="beta is 0"):
        TrainConfig(model="zoo:gpt2", data="x", output=tmp_path / "o", beta=0.0)


def test_a_student_that_is_missing_costs_no_reply_again(
    room: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(room / "cache"))
    cell = {**CELL, "data": "own.jsonl", "backend": "endpoint", "base_url": server.url, "teacher": "own/teacher",
            "package": "reflection-tuning", "student": "missing"}  # fmt: skip
    counts = []
    for _ in range(2):
        with pytest.raises(RequestError, match="missing"):
            tables.reflect_and_score(cell, some_records(4))
        counts.append(len(server.calls))
    assert counts == [13, 13]  # three reflections on each record, and the probe


def test_the_papers_student_computes_its_activations_again(tmp_path: Path) -> None:
    for scale, wanted in (("tiny", False), ("paper", True)):
        cell = PAPER.tables()["main"].units(scale)[0].cell
        config = config_of(cell, TrainConfig, "m", tmp_path / "data", tmp_path / "out")
        assert config.gradient_checkpointing is wanted


@pytest.mark.slow
def test_a_student_of_preferences(room: Path, student: Path) -> None:
    pytest.importorskip("trl", reason="needs the extra [train]")
    from instruct_data.completions import preference

    pairs = [preference(r["id"], [{"role": "user", "content": r["instruction"]}], f"Well, {r['output']}", r["output"])
             for r in some_records(4)]  # fmt: skip
    found = train(TrainConfig(
        model=str(student), data=lines("pairs.jsonl", pairs), output=room / "dpo", preferred=True, template="none",
        max_length=64, batch_size=2, accumulation=1, max_steps=2, learning_rate=1e-3, log_every=1,
    ))  # fmt: skip
    assert (found["records"], found["steps"]) == (4, 2)
    assert "2402.10110" in (room / "dpo" / "README.md").read_text()
    before, after = (load(path, tokenizer=False)[0].state_dict() for path in (student, room / "dpo"))
    assert any(not before[name].equal(after[name]) for name in before)


@pytest.mark.slow
def test_the_quick_scale_runs_whole() -> None:
    """`reflection-tuning reproduce --scale quick`: the teacher learns and reflects, the student selects and follows."""
    pytest.importorskip("trl", reason="needs the extra [train]")
    context = Context()
    found = {
        (table.id, unit.cell["row"]): run(unit.cell, context)
        for table in PAPER.tables().values()
        for unit in table.units("quick")
    }
    assert set(found) == {("main", "original"), ("main", "v1"), ("main", "v2"), ("selection", "all")}
    assert found["main", "v1"]["records"] == found["main", "original"]["records"] == 15
    for (table, _), values in found.items():
        assert 0 <= values["right" if table == "main" else "emitted"] <= 100
    assert 0 < found["main", "original"]["loss"]["value"] < 10
