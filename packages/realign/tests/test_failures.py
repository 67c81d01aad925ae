"""Requests that fail for good, and a paper's table that is stopped: nothing is made up, nothing is paid for twice."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from commands import Command
from llm_server import Answer, Call, Server, answer, refusal
from realign.cli import app
from realign.tables import PAPER, realigned
from realign.train import TrainConfig
from rewriters import rewriting

from instruct_data import read
from instruct_data.llm import ServiceFailed
from paper_tables import Context
from paper_tables.training import config_of

said = Command(app).said


def test_a_request_for_the_task_that_failed_names_no_task(room: Path, server: Server) -> None:
    rows = [{"id": n, "instruction": f"What is {n}?", "output": f"It is {n}."} for n in range(2)]
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def script(call: Call) -> Answer:
        if "kind of task" not in str(call.json["messages"][0]["content"]):
            return rewriting(call)
        return refusal(400, "too long") if call.prompt.startswith("What is 1") else answer("closed_qa")

    server.script = script
    options = ("--classifier", "model", "--model", "fake", "--base-url", server.url, "--filters", "none")
    found = said("classify", "in.jsonl", "-o", "classified.jsonl", *options[:-2])
    assert [r.data["realign_category"] for r in read("classified.jsonl")] == ["closed_qa", None]
    assert (found["fallbacks"], found["tasks"][1]) == (0, {"task": "(failed)", "records": 1})
    found = said("run", "classified.jsonl", "-o", "out.jsonl", *options)
    good, bad = (record.data for record in read("out.jsonl"))
    assert (good["realign_status"], good["realign_category"]) == ("rewrite", "closed_qa")
    assert (bad["realign_status"], bad["realign_reason"], bad["realign_category"]) == ("original", "failed", None)
    assert bad["output"] == "It is 1."
    server.script = lambda call: answer("closed_qa") if call.prompt.startswith("What is 1") else rewriting(call)
    again = said("run", "out.jsonl", "-o", "again.jsonl", *options)
    assert again["rewritten"] == 2


def test_a_table_that_is_stopped_pays_for_no_reply_again(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(room / "cache"))
    rows = [{"instruction": f"{n} + 1?", "output": f"It is {n + 1}.", "category": "math_puzzles"} for n in range(8)]
    paid: Counter[bytes] = Counter()

    def pay(call: Call) -> Answer:
        paid[call.body] += 1
        return rewriting(call)

    with Server(lambda call: pay(call) if sum(paid.values()) < 6 else refusal(401)) as server:
        cell: dict[str, Any] = {
            "data": "problems.jsonl", "backend": "endpoint", "base_url": server.url, "teacher": "own/teacher",
            "package": "realign", "seed": 0,
        }  # fmt: skip
        with pytest.raises(ServiceFailed):
            realigned(cell, Context(), rows, [])
        server.script = pay
        whole = realigned(cell, Context(), rows, [])
        assert len(whole) == 8
        assert (sum(paid.values()), set(paid.values())) == (17, {1, 2})  # two candidates of each, and the probe
        assert realigned(cell, Context(), rows, []) == whole
        assert sum(paid.values()) == 17
        realigned({**cell, "seed": 1}, Context(), rows, [])
        assert sum(paid.values()) == 34
    assert {folder.name[:11] for folder in (room / "cache/leanformers/realign").iterdir()} == {"own-teacher"}


def test_the_papers_student_computes_its_activations_again(tmp_path: Path) -> None:
    def computes_again(scale: str) -> set[bool]:
        cells = [unit.cell for unit in PAPER.tables()["main"].units(scale)]
        made = (config_of(cell, TrainConfig, "m", tmp_path / "data", tmp_path / "out") for cell in cells)
        return {config.gradient_checkpointing for config in made}

    assert [computes_again(scale) for scale in ("quick", "tiny", "paper")] == [{False}, {False}, {True}]
