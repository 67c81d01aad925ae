"""Tuning in two processes (gloo on CPU), plain, under ZeRO-2 and under ZeRO-3, gives what one process gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mod_router.tune import TuneConfig, tune
from processes import flags, ranks
from safetensors.torch import load_file

pytest.importorskip("deepspeed", reason="needs the extra [train]")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SETTINGS: dict[str, Any] = {
    "model": "zoo:llama", "data": "zoo:calibration", "heldout": "zoo:heldout", "samples": 16, "length": 32,
    "heldout_samples": 4, "batch_size": 2, "accumulation": 2, "max_steps": 4, "layers": "last:6", "noise": 0.0,
    "log_every": 1, "target_capacity": 0.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("alone") / "routers"
    return output, tune(TuneConfig(**SETTINGS | {"batch_size": 4, "output": output}))


@pytest.mark.parametrize("deepspeed", ["", "zero2", "zero3"])
def test_two_processes(deepspeed: str, alone: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, expected = alone
    options = SETTINGS | ({"deepspeed": deepspeed} if deepspeed else {})
    program = ("-m", "mod_router.tune", "--json", "--output", tmp_path / "routers", *flags(options))
    result = ranks(*program, log=tmp_path / "log").result()
    assert result["steps"] == expected["steps"]
    assert result["trainable"] == expected["trainable"] == 6 * 128
    assert result["base_loss"] == pytest.approx(expected["base_loss"], abs=1e-4)
    one, many = (load_file(f / "router.safetensors") for f in (folder, tmp_path / "routers"))
    assert one.keys() == many.keys()
    for key in one:
        assert float(many[key].abs().max()) > 0
        # Adam's first steps follow signs, so what sums in another order may differ in a few coordinates
        assert torch.nn.functional.cosine_similarity(one[key], many[key]).item() > 0.9
    logs = [[json.loads(x) for x in (f / "training_log.jsonl").read_text().splitlines()]
            for f in (folder, tmp_path / "routers")]  # fmt: skip
    losses = [[e["loss"] for e in log if "loss" in e] for log in logs]
    assert losses[1][0] == pytest.approx(losses[0][0], abs=1e-3)
    assert len(losses[1]) == 4
