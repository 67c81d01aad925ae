"""Models at work on rows: padding changes nothing, gates see prompts as training does, a GPU is used and left again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from meo import load
from meo.converting import banks
from meo.data import collate
from meo.workflow import gate_report, load_for, scored
from mergedmodels import GPT2, ids, merged, write
from transformers import PreTrainedTokenizerFast

PADDED = SimpleNamespace(pad_token_id=0, eos_token_id=None)


def test_rows_are_classified_alike_in_any_batch_without_a_padding_token(tmp_path: Path) -> None:
    model, tokenizer = load(write(tmp_path / "padded", "GPT2LMHeadModel", "GPT2Config", GPT2))
    model.config.pad_token_id = None
    model.save_pretrained(tmp_path / "plain")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<|end|>").save_pretrained(
        tmp_path / "plain"
    )
    model, tokenizer = load_for(str(tmp_path / "plain"), "classification", None, labels=["a", "b"])
    assert tokenizer.pad_token_id is None
    rows: list[dict[str, Any]] = [{"input_ids": ids(1, n, seed=n)[0].tolist(), "labels": 0} for n in (4, 11, 7)]
    with torch.no_grad():
        together = model(**collate(rows, "classification", tokenizer)).logits
        alone = torch.cat([model(**collate([row], "classification", tokenizer)).logits for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_reported_gates_are_those_of_the_prompts() -> None:
    """All rows begin alike, so gates that differ saw more than the first token."""
    rows = []
    for seed in range(8):
        tokens = [5, *ids(1, 9, seed=seed)[0].tolist()]
        rows.append({"input_ids": tokens, "labels": [-100] * 6 + tokens[6:]})
    found = gate_report(merged("gpt2", level="prefix"), PADDED, rows, "qa")
    assert found[0]["distinct"] > 0
    alike = [{**row, "labels": row["input_ids"]} for row in rows]
    assert gate_report(merged("gpt2", level="prefix"), PADDED, alike, "qa")[0]["distinct"] == 0


def test_gates_of_encoder_decoders_are_reported() -> None:
    model = merged("t5")
    rows = [{"input_ids": ids(1, n, seed=n)[0].tolist(), "labels": [4, 5, 6]} for n in (6, 9)]
    assert [row["bank"] for row in gate_report(model, PADDED, rows, "qa")] == list(banks(model))


def test_figures_are_measured_on_a_gpu_and_the_model_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[str] = []

    class Moved:
        def to(self, place: str) -> Moved:
            places.append(place)
            return self

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("meo.scoring.evaluate", lambda *args, **kwargs: places.append("measured"))
    settings = {"kind": "clm", "batch_size": 1, "target_length": 1, "min_target_length": 0, "beams": 1}
    scored(Moved(), None, [], SimpleNamespace(**settings, no_repeat_ngram_size=0))
    assert places == ["cuda", "measured", "cpu"]
