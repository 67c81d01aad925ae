"""Training on realigned records and on preferences, and the exact match of a student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import Command
from realign.cli import app
from realign.eval import exact_match
from realign.train import TrainConfig, train

from instruct_data import read
from instruct_data.completions import preferences
from model_hooks import RequestError, load
from paper_tables.launch import deepspeed_file

COMMAND = Command(app)
QUICK: dict[str, Any] = {"template": "none", "max_length": 64, "batch_size": 2, "accumulation": 1, "max_steps": 2,
                         "learning_rate": 1e-3, "log_every": 1}  # fmt: skip


def pair(number: int) -> dict[str, Any]:
    return {
        "id": str(number), "prompt": [{"role": "user", "content": f"What is {number}?"}],
        "chosen": [{"role": "assistant", "content": f"1. It is {number}."}],
        "rejected": [{"role": "assistant", "content": f"{number}"}],
    }  # fmt: skip


def test_preferences_are_read_as_texts(room: Path) -> None:
    file = room / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair(n)) + "\n" for n in range(3)))
    assert preferences(str(file), "none", None)[2] == {
        "prompt": "What is 2?\n", "chosen": "1. It is 2.", "rejected": "2",
    }  # fmt: skip
    file.write_text(json.dumps({"prompt": []}) + "\n")
    with pytest.raises(RequestError, match="needs prompt, chosen and rejected"):
        preferences(str(file), "none", None)
    with pytest.raises(RequestError, match="beta is 0"):
        TrainConfig(model="zoo:gpt2", data="x", output=room / "o", beta=0.0)


def test_the_shipped_deepspeed_files_are_found() -> None:
    from realign import train as module

    for name in ("zero2", "zero3", "zero3-offload"):
        assert deepspeed_file(module.__file__, name)


@pytest.mark.slow
def test_students_of_answers_and_of_preferences(room: Path) -> None:
    pytest.importorskip("trl", reason="needs the extra [train]")
    answers, pairs = room / "answers.jsonl", room / "pairs.jsonl"
    answers.write_text("".join(json.dumps({"instruction": f"What is {n}?", "output": f"{n}"}) + "\n" for n in range(4)))
    pairs.write_text("".join(json.dumps(pair(n)) + "\n" for n in range(4)))
    found = train(TrainConfig(model="zoo:gpt2", data=str(answers), output=room / "student", **QUICK))
    assert (found["records"], found["steps"]) == (4, 2)
    assert "2402.12219" in (room / "student" / "README.md").read_text()
    preferred = TrainConfig(model=str(room / "student"), data=str(pairs), output=room / "dpo", preferred=True, **QUICK)
    found = train(preferred)
    assert found["steps"] == 2
    before, after = (load(room / name, tokenizer=False)[0].state_dict() for name in ("student", "dpo"))
    assert any(not before[name].equal(after[name]) for name in before)
    model, tokenizer = load(room / "student", dtype="float32")
    problems = read([{"instruction": "x", "output": "#### 3"}] * 3, name="p", reid=True)
    told = exact_match(model, tokenizer, problems, template="none", max_new_tokens=4, batch_size=2)
    assert told["problems"] == 3
    assert told["exact_match"]["value"] in (0.0, 100.0)  # equal prompts have equal answers
    with pytest.raises(RequestError, match="no number to compare with"):
        exact_match(model, tokenizer, read([{"instruction": "x", "output": "none"}], name="p"))
