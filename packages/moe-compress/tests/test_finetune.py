"""LoRA on attention and fused experts after trimming lowers the loss; a killed run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_compress import Plan
from moe_compress.workflow import trim_to_folder

from model_hooks import RequestError, load

pytest.importorskip("peft", reason="needs the extra [train]")
from moe_compress.finetune import TuneConfig, finetune

SETTINGS: dict[str, Any] = {
    "data": "zoo:calibration", "samples": 48, "length": 32, "heldout_samples": 8, "batch_size": 8, "accumulation": 1,
    "max_steps": 12, "learning_rate": 1e-2, "rank": 4, "alpha": 8, "log_every": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def trimmed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("t") / "trimmed"
    trim_to_folder(str(folder), Plan(keep={1: (0, 1, 2), 2: (4, 5, 6, 7)}, layers=(3,)), out, measure="")
    return out


@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_training_lowers_the_loss_of_attention_and_experts_alone(method: str, trimmed: Path, tmp_path: Path) -> None:
    settings = SETTINGS | ({"learning_rate": 1e-3} if method == "full" else {})
    result = finetune(TuneConfig(model=str(trimmed), output=tmp_path / "out", method=method, **settings))
    assert result["steps"] == 12
    assert result["loss_after"] < result["loss_before"] - 0.01
    before, after = (load(f, tokenizer=False)[0].state_dict() for f in (trimmed, tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "model.layers.1.mlp.experts.down_proj" in changed
    assert "model.layers.0.self_attn.q_proj.weight" in changed
    assert after["model.layers.1.mlp.experts.gate_up_proj"].shape[0] == 3
    if method == "lora":
        assert not any("gate.weight" in name or "norm" in name or "embed" in name for name in changed)
    log = [json.loads(line) for line in (tmp_path / "out/training_log.jsonl").read_text().splitlines()]
    assert log[0]["eval_loss"] == pytest.approx(result["loss_before"])
    assert not (tmp_path / "out.training").exists()


def test_settings_that_cannot_be(trimmed: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="method 'qlora' is not accepted"):
        TuneConfig(model="m", output=tmp_path / "x", method="qlora")
    with pytest.raises(RequestError, match="no MoE layers found"):
        finetune(TuneConfig(model="zoo:llama", output=tmp_path / "x", **SETTINGS))
    with pytest.raises(RequestError, match="is more than the model's context"):
        finetune(TuneConfig(model=str(trimmed), output=tmp_path / "x", **SETTINGS | {"length": 999}))
    assert list(tmp_path.iterdir()) == []
