"""The shipped configurations say what the verbs know; nothing is sent and no tokenizer is loaded."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
from commands import Command
from realign.cli import app
from realign.taxonomy import load_taxonomy
from realign.train import TrainConfig

from paper_tables.yamlfile import read_yaml

CONFIGS = Path(__file__).parents[1] / "configs"
OTHERS = {"sft.yaml", "word-problems.yaml"}  # of `train`, and a taxonomy


@pytest.mark.parametrize("name", sorted(file.name for file in CONFIGS.glob("*.yaml") if file.name not in OTHERS))
def test_a_run_takes_every_key(name: str, room: Path) -> None:
    rows = [{"instruction": "Is 1 < 2?", "output": "Yes, it is.", "category": "math_puzzles"}] * 3
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = Command(app).said("run", "in.jsonl", "--config", CONFIGS / name, "--dry-run", "-o", "out.jsonl")
    assert found["requests"] == 6  # two replies each, as published


def test_training_takes_every_key_and_the_taxonomy_is_one() -> None:
    assert set(read_yaml(CONFIGS / "sft.yaml")) <= {field.name for field in fields(TrainConfig)}
    assert load_taxonomy(CONFIGS / "word-problems.yaml")["math_puzzles"].rewrite
