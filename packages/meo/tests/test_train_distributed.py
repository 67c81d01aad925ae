"""Training in two processes (gloo on CPU) gives what one process gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from meo import load
from meo.converting import banks
from meo.train import TrainConfig, train
from mergedmodels import GPT2, write
from processes import flags, ranks

pytest.importorskip("accelerate", reason="needs the extra [train]")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SETTINGS: dict[str, Any] = {
    "kind": "clm", "data": "zoo:calibration", "heldout": "zoo:heldout", "samples": 32, "length": 32,
    "heldout_samples": 8, "batch_size": 4, "max_steps": 3, "gate": "topk", "level": "chunk", "chunk": 8,
    "experts": 4, "k": 2, "learning_rate": 1e-2, "log_every": 1, "warmup": 0.0,
}  # fmt: skip


def losses(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    return [entry for entry in lines if "loss" in entry]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    room = tmp_path_factory.mktemp("alone")
    base = write(room / "base", "GPT2LMHeadModel", "GPT2Config", {**GPT2, "attn_pdrop": 0.0, "embd_pdrop": 0.0,
                                                                  "resid_pdrop": 0.0})  # fmt: skip
    train(TrainConfig(**SETTINGS | {"batch_size": 8, "model": str(base), "output": room / "out"}))
    return base, room / "out"


def test_two_processes(alone: tuple[Path, Path], tmp_path: Path) -> None:
    base, one = alone
    options = flags({**SETTINGS, "model": base, "output": tmp_path / "out"})
    ranks("-m", "meo.train", *options, log=tmp_path / "log").finish()
    expected, found = losses(one), losses(tmp_path / "out")
    assert len(found) == 3
    for a, b in zip(expected, found):
        # the balance is of all processes' groups; the task's loss is logged for the first process or for all
        assert b["balance"] == pytest.approx(a["balance"], rel=0.05)
        assert b["loss"] == pytest.approx(a["loss"], rel=0.05)
    (first, _), (second, _) = load(one), load(tmp_path / "out")
    for name, bank in banks(first).items():
        other = banks(second)[name]
        change = (bank.weight - other.weight).abs().mean() / bank.weight.abs().mean()
        assert float(change) < 0.25
        assert float(other.w_gate.abs().max()) > 0
