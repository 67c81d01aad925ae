"""Finetuning in two processes (gloo on CPU), under ZeRO-2 and ZeRO-3, gives what one process gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_compress import Plan
from moe_compress.finetune import TuneConfig, finetune
from moe_compress.workflow import trim_to_folder
from processes import flags, ranks

from model_hooks import load

pytest.importorskip("deepspeed", reason="needs the extra [train]")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SETTINGS: dict[str, Any] = {
    "data": "zoo:calibration", "samples": 24, "length": 32, "heldout_samples": 8, "batch_size": 2, "accumulation": 2,
    "max_steps": 4, "learning_rate": 1e-2, "rank": 4, "alpha": 8, "log_every": 1,
}  # fmt: skip


PLANS = {
    "even": Plan(keep=dict.fromkeys(range(4), (0, 1, 2, 5))),
    "uneven": Plan(keep={1: (0, 1, 2), 2: (4, 5, 6, 7)}, layers=(3,)),
}


@pytest.mark.parametrize(
    ("deepspeed", "method", "plan"),
    [("zero2", "lora", "uneven"), ("zero3", "lora", "even"), ("zero3", "full", "uneven")],
)
def test_two_processes_give_what_one_gives(
    deepspeed: str, method: str, plan: str, folder: Path, tmp_path: Path
) -> None:  # fmt: skip
    trimmed = tmp_path / "trimmed"
    trim_to_folder(str(folder), PLANS[plan], trimmed, measure="")
    settings = SETTINGS | {"model": str(trimmed), "method": method}
    settings |= {"learning_rate": 1e-3} if method == "full" else {}
    one, many = tmp_path / "one", tmp_path / "many"
    expected = finetune(TuneConfig(output=one, **settings | {"batch_size": 4}))
    options = settings | {"deepspeed": deepspeed, "output": many}
    program = ("-m", "moe_compress.finetune", "--json", *flags(options))
    result = ranks(*program, log=tmp_path / "log").result()
    for key in ("steps", "trainable"):
        assert result[key] == expected[key]
    assert result["loss_before"] == pytest.approx(expected["loss_before"], abs=1e-4)
    assert result["loss_after"] == pytest.approx(expected["loss_after"], abs=5e-3)
    assert result["loss_after"] < result["loss_before"] - 0.01
    logs = [[json.loads(x) for x in (f / "training_log.jsonl").read_text().splitlines()] for f in (many, one)]
    losses, wanted = ([e["loss"] for e in log if "loss" in e] for log in logs)
    assert losses == pytest.approx(wanted, abs=5e-3)
    before, a, b = (load(f, tokenizer=False)[0].state_dict() for f in (trimmed, many, one))
    assert a.keys() == b.keys() == before.keys()
    for name in ("model.layers.1.mlp.experts.down_proj", "model.layers.0.self_attn.q_proj.weight"):
        moved, meant = a[name] - before[name], b[name] - before[name]
        assert float(moved.abs().max()) > 0
        # Adam's first steps follow signs, so what sums in another order may differ in a few coordinates
        assert torch.nn.functional.cosine_similarity(moved.flatten(), meant.flatten(), dim=0).item() > 0.9
    assert not many.with_name("many.training").exists()
