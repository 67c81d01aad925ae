"""Real text beyond the zoo: score, drop and evaluate on WikiText-2 and GSM8K, where the folder with them is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from llm_drop.cli import app
from typer.testing import CliRunner

from model_hooks.text import read_documents

REAL = Path(__file__).resolve().parents[4] / "shared" / "data"
FILES = ("wikitext2_valid.txt", "gsm8k_train.jsonl")
pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason="the folder ../shared/data with real text is not there")


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_score_drop_and_evaluate(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = ("--data", str(REAL / name))

    def call(*arguments: object) -> dict:  # type: ignore[type-arg]
        result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)  # type: ignore[no-any-return]

    scored = call("score", "zoo:llama", *data, "--samples", 4, "--length", 256, "--dtype", "float32")
    assert (scored["samples"], scored["tokens"]) == (4, 1024)
    call("plan", "scores.json", "--attention", 3)
    cut = ("--documents", 20, "--characters", 8000)
    call("drop", "zoo:llama", "plan.json", "-o", "out", "--measure", REAL / name)
    rows = {r["figure"]: r for r in call("eval", "out", "--baseline", "zoo:llama", *data, *cut)["figures"]}
    bits = rows["bits_per_byte"]
    assert 0.5 < bits["baseline"] < 8
    assert 0.9 < bits["ratio"] < 2
    assert rows["kv_bytes"]["ratio"] == pytest.approx(17 / 20)


def test_records_become_questions_with_answers() -> None:
    first = next(iter(read_documents(REAL / "gsm8k_train.jsonl")))
    assert "Natalia" in first
    assert "#### 72" in first
