"""Records of every task, and a server that rewrites them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from llm_server import Server, in_a_room
from realign.instructions import generate
from realign.taxonomy import load_taxonomy

sys.path.insert(0, str(Path(__file__).parent))  # for rewriters.py

from rewriters import rewriting


@pytest.fixture(autouse=True)
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test in a folder of its own, without a key in the environment and without waiting."""
    return in_a_room(tmp_path, monkeypatch)


@pytest.fixture
def server() -> Any:
    with Server(rewriting) as running:
        yield running


@pytest.fixture
def mixed(room: Path) -> Path:
    """An alpaca file with a record of each task that names its task."""
    tasks = load_taxonomy().tasks
    texts, labels = generate(1)
    rows = [
        {"id": f"r{n}", "instruction": text, "output": f"The answer is number {n}.", "category": task}
        for n, (text, task) in enumerate(zip(texts, labels))
    ]
    assert [row["category"] for row in rows] == list(tasks)
    file = room / "mixed.json"
    file.write_text(json.dumps(rows))
    return file
