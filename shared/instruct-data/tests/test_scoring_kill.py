"""kill -9 at random times: the result is the uninterrupted one, bit by bit, and hardly anything is computed twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import scoring_reference as reference
from scoring_kill import BUDGET, HANDFUL

from instruct_data.scoring import merge, score


@pytest.mark.slow
def test_killed_at_ten_random_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kills, world, folder = 5, 2, tmp_path / "run"
    script = Path(__file__).with_name("scoring_kill.py")
    command = [sys.executable, str(script), str(folder), str(kills), str(world)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["hits"] >= kills * world // 2  # most kills came before the end

    monkeypatch.setattr("instruct_data.scoring.forward.HANDFUL", HANDFUL)
    quiet, options = tmp_path / "quiet", {"max_length": 128, "budget": BUDGET, "world": world}
    for rank in range(world):
        score(reference.model(), reference.tokenizer(), reference.some_pairs(90), folder=quiet, rank=rank, **options)
    assert (folder / "scores" / "rows.arrow").read_bytes() == (merge(quiet).folder / "rows.arrow").read_bytes()
    twice = sum(count - 1 for count in told["forwarded"])
    assert twice <= told["hits"] * told["largest"]
    assert [path.name for path in folder.glob(".*")] == []
